import numpy as np
from PIL import Image

from jlml_jax import contact_sheet, user_images
from jlml_jax.user_images import UserImage

LEFT = (8, 128, 232)  # of each column, pixels
COLORS = [(200, 30, 30), (30, 200, 30), (30, 30, 200)]


def test_each_file_is_decoded_once_for_all_its_cells(tmp_path, monkeypatch):
    names, original = [], user_images.open_rgb
    monkeypatch.setattr(user_images, "open_rgb", lambda data, name, **options: names.append(name)
                        or original(data, name, **options))
    frame = Image.new("RGB", (60, 40))
    for number, color in enumerate(COLORS):
        frame.paste(color, (20 * number, 0, 20 * number + 20, 40))
    for name in ("a.png", "b.png"):
        frame.save(tmp_path / name)
    cells = [[("a", 0), ("b", 1), ("a", 2)], [("b", 2), ("gone", 0), ("b", 2)], [("a", 1)]]
    contact_sheet.draw(tmp_path / "sheet.png", [
        [(UserImage(tmp_path / f"{name}.png", name, box=(20 * number, 0, 20, 40)), name) for name, number in row]
        for row in cells])
    assert len(names) == 2
    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels = np.asarray(sheet)
    for row, of_row in enumerate(cells):
        for column, (name, number) in enumerate(of_row):
            cell = pixels[224 * row + 8:, LEFT[column]:][:192, :96]
            if name == "gone":
                assert (cell == 255).mean() > 0.9 and (cell != 255).any()  # says so
            else:
                assert (cell == COLORS[number]).all()
