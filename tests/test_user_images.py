import io
import os
import re
import warnings
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from splits import drawing

from jlml_jax import user_images
from jlml_jax.errors import UserError
from jlml_jax.user_images import list_images, load_images, load_one, read_batches

RED, BLUE = (220, 20, 20), (20, 20, 220)


def write_image(path, size=(16, 32), mode="RGB", color=RED, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).convert(mode).save(path, **options)
    return path


def loaded(path, height=8, width=8):
    image, = list_images(str(path)).images
    return load_one(image, height, width)


def test_a_folder_is_searched_to_the_bottom_and_sorted(tmp_path):
    for name in ("b.png", "a/z.JPG", "a/y.webp", ".hidden/x.png", "a/._z.JPG"):
        write_image(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    listing = list_images(str(tmp_path))
    assert [image.file for image in listing.images] == ["a/y.webp", "a/z.JPG", "b.png"]
    assert "1 files" in listing.notes[0] and "notes.txt" in listing.notes[0]
    assert [image.file for image in list_images(str(tmp_path / "**" / "*.png")).images] == [str(tmp_path / "b.png")]


def test_linked_folders_are_searched_once(tmp_path):
    root = tmp_path / "crops"
    for name in ("crops/b/y.png", "elsewhere/x.png", "elsewhere/deep/w.png"):
        write_image(tmp_path / name)
    (root / "a").symlink_to(root / "b")  # leads to what is there under its own name
    (root / "c").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "round").symlink_to(root)
    (root / "nowhere").symlink_to(tmp_path / "gone")
    assert [image.file for image in list_images(str(root)).images] == ["b/y.png", "c/deep/w.png", "c/x.png"]


def test_a_pipe_is_no_image(tmp_path):
    write_image(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.png")
    (tmp_path / "c.png").symlink_to("gone")  # is one, which will be told
    assert [image.file for image in list_images(str(tmp_path)).images] == ["a.png", "c.png"]


def test_folders_whose_names_are_no_text_are_refused(tmp_path):
    write_image(tmp_path / "x.png")
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    folder.mkdir()
    (tmp_path / "x.png").rename(folder / "x.png")
    for source in (folder, folder / "x.png"):
        with pytest.raises(UserError, match="1 images in .* have names, or folders, that are not valid UTF-8"):
            list_images(str(source))


def test_paths_that_lead_nowhere_are_told(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "list.csv").write_text("image\nloop\n")
    image, = list_images(str(tmp_path / "list.csv")).images
    with pytest.raises(UserError, match=rf"loop \(line 2\) cannot be read \(.*: {tmp_path / 'loop'}\)"):
        load_one(image, 8, 8)
    with pytest.raises(UserError, match="~nobody_of_that_name/x does not exist"):
        list_images("~nobody_of_that_name/x")


@pytest.mark.parametrize(("names", "expected"), [
    (["0002_c1s1_000451_03.jpg", "-1_c6s3_000001_00.jpg.jpg"], [("junk", "6"), ("2", "1")]),
    (["0002_c1s1_000451_03.jpg", "holiday.jpg"], [("", ""), ("", "")]),
])
def test_market_names_count_only_if_all_are_such(tmp_path, names, expected):
    for name in names:
        write_image(tmp_path / name)
    listing = list_images(str(tmp_path))
    assert [(image.identity, image.camera) for image in listing.images] == expected
    assert bool(listing.notes) == bool(expected[0][0])


def test_a_csv_gives_identity_camera_and_box(tmp_path):
    frame = Image.new("RGB", (40, 30), RED)
    frame.paste(BLUE, (10, 5, 26, 25))
    (tmp_path / "frames").mkdir()
    frame.save(tmp_path / "frames" / "f.png")
    (tmp_path / "boxes.csv").write_text(
        "\ufeffimage, identity,camera,x,y,width,height,score\n"
        "frames/f.png,anna,door,10,5,16,20,0.9\nframes/./f.png,,,0,0,8.4,8,0.8\n", encoding="utf-8")
    listing = list_images(str(tmp_path / "boxes.csv"))
    anna, other = listing.images
    assert (anna.file, anna.identity, anna.camera, anna.box) == ("frames/f.png", "anna", "door", (10, 5, 16, 20))
    assert (other.file, other.identity, other.camera, other.box) == ("frames/f.png", "", "", (0, 0, 8, 8))
    assert listing.notes == ("columns that are not read: score",)
    crops = list(load_images(listing.images, 20, 16))
    assert (crops[0].pixels == BLUE).all() and (crops[1].pixels == RED).all()
    assert crops[0].digest != crops[1].digest


@pytest.mark.parametrize(("text", "message"), [
    ("file\na.png\n", "no column image"),
    ("image,image\na.png,a.png\n", "two columns image"),
    ("image,x,y\na.png,1,2\n", "lacks width, height of a box"),
    ("image,camera\na.png\n", "1 lines have not 2 cells"),
    ("image,camera\na.png,1,2\n", "1 lines have not 2 cells"),
    ("image\na.png\n../secret.png\n", "line 3: ../secret.png leaves the folder"),
    ("image\nsub/../../secret.png\n", "line 2: sub/../../secret.png leaves the folder"),
    ("image\n/etc/passwd\n", "line 2: /etc/passwd is an absolute path, and must start"),
    ("image\nlink/secret.png\n", "line 2: link/secret.png leaves the folder of the CSV by a symbolic link"),
    ("image,x,y,width,height\na.png,0,0,0,5\n", "line 2: the box of a.png is 0 x 5"),
    ("image,x,y,width,height\na.png,0,0,5,-5\n", "line 2: the box of a.png is 5 x -5"),
    ("image,x,y,width,height\na.png,0,0,5,\n", "line 2: the box of a.png is not four numbers"),
    ("image,x,y,width,height\na.png,0,nan,5,5\n", "line 2: the box of a.png is not finite"),
    ("image\n", "lists no images"),
    ("", "is empty"),
    ('image\n"a.png\n', "line 2: unexpected end of data"),
    (b"image\n\xff.png\n", "not text in UTF-8"),
    ("image,identity\na.png,-1\n", "line 2: write junk for identity -1"),
    ("image,identity\na.png,-1.0\n", "line 2: write junk for identity -1"),
    ("image,identity\na.png,012\na.png,12\n", "1 identities are written in two ways: 012 and 12"),
    ("image,camera\na.png,1\na.png,1.0\n", "1 cameras are written in two ways: 1 and 1.0"),
])
def test_a_csv_that_cannot_be_right_is_refused(tmp_path, text, message):
    folder = tmp_path / "folder"
    write_image(folder / "a.png")
    write_image(tmp_path / "secret.png")
    (folder / "link").symlink_to(tmp_path)
    path = folder / "list.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as error:
        list_images(str(path))
    assert message in str(error.value) and "list.csv" in str(error.value)


def test_a_link_within_the_folder_of_the_csv_may_be_followed(tmp_path):
    write_image(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("a.png")
    (tmp_path / "list.csv").write_text("image\nb.png\n")
    assert list_images(str(tmp_path / "list.csv")).images[0].file == "b.png"


def test_a_file_of_many_lines_is_looked_up_once(tmp_path, monkeypatch):
    looked_up, original = [], os.path.realpath
    monkeypatch.setattr(os.path, "realpath", lambda path, **options: looked_up.append(str(path))
                        or original(path, **options))
    (tmp_path / "f.png").symlink_to("elsewhere/f.png")
    assert len(boxes_of_frames(tmp_path / "elsewhere", [("f.png", x) for x in range(30)])) == 30
    (tmp_path / "b.csv").write_text("image\n" + "f.png\nelsewhere/../f.png\n" * 30)
    assert len(list_images(str(tmp_path / "b.csv")).images) == 60
    assert max(map(looked_up.count, looked_up)) <= 2  # the folder of the CSV, and a link


@pytest.mark.parametrize("source", ["nothing", "nothing/*.png"])
def test_what_is_not_there_is_refused(tmp_path, source):
    with pytest.raises(UserError, match="nothing"):
        list_images(str(tmp_path / source))


@pytest.mark.parametrize(("suffix", "mode"), [
    (".jpg", "RGB"), (".jpg", "L"), (".jpg", "CMYK"), (".png", "P"), (".png", "1"), (".png", "LA"), (".png", "RGBA"),
    (".webp", "RGB"), (".bmp", "RGB"), (".gif", "P"), (".tif", "RGB"), (".tif", "CMYK"), (".tif", "LAB"),
    (".ppm", "RGB"),
])
def test_modes_and_containers(tmp_path, suffix, mode):
    if mode == "LAB":
        path = tmp_path / f"a{suffix}"
        Image.new("LAB", (16, 32), (128, 128, 128)).save(path)
        assert loaded(path).shape == (8, 8, 3)
        return
    pixels = loaded(write_image(tmp_path / f"a{suffix}", mode=mode))
    assert pixels.shape == (8, 8, 3) and pixels.dtype == np.uint8
    if mode == "1":
        assert set(np.unique(pixels)) <= set(range(256))
    else:
        grey = round(0.299 * RED[0] + 0.587 * RED[1] + 0.114 * RED[2])
        expected = (grey,) * 3 if mode in ("L", "LA") else RED
        np.testing.assert_allclose(pixels.reshape(-1, 3).mean(0), expected, atol=12)


def test_exif_rotation_and_transparency(tmp_path):
    image = Image.new("RGB", (40, 20), RED)
    image.paste(BLUE, (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise: what was left is above
    image.save(tmp_path / "turned.png", exif=exif)
    pixels = loaded(tmp_path / "turned.png", 40, 20)
    assert (pixels[:18] == BLUE).all() and (pixels[22:] == RED).all()

    clear = Image.new("RGBA", (16, 16), (*RED, 0))
    clear.paste((*BLUE, 255), (0, 0, 16, 8))
    clear.save(tmp_path / "clear.png")
    pixels = loaded(tmp_path / "clear.png", 16, 16)
    assert (pixels[:8] == BLUE).all() and (pixels[8:] == 128).all()


def test_bad_images_are_told_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    good = write_image(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:60])
    (tmp_path / "text.png").write_text("text")
    write_image(tmp_path / "one.png", (1, 1))
    write_image(tmp_path / "large.png", (40, 40))
    write_image(tmp_path / "bomb.png", (100, 100))
    Image.fromarray(np.full((16, 16), 40_000, np.uint16)).save(tmp_path / "deep.png")
    write_image(tmp_path / "gone.png")
    images = list_images(str(tmp_path)).images
    (tmp_path / "gone.png").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        results = {result.image.file: result for result in load_images(images, 8, 8)}
    assert results["good.png"].error is None
    for name, words in {
        "cut.png": "does not decode", "text.png": "not an image", "one.png": "1 x 1 pixels", "gone.png": "be read",
        "large.png": "40 x 40 pixels", "bomb.png": "decompression bomb", "deep.png": "more than 8 bits",
    }.items():
        assert name in results[name].error and words in results[name].error and results[name].pixels is None


def test_a_box_beyond_its_frame_is_told_by_its_line(tmp_path):
    write_image(tmp_path / "f.png", (40, 30))
    (tmp_path / "b.csv").write_text("image,x,y,width,height\nf.png,0,0,40,30\nf.png,30,0,11,10\nf.png,-1,0,9,9\n")
    errors = [result.error for result in load_images(list_images(str(tmp_path / "b.csv")).images, 8, 8)]
    assert errors[0] is None
    assert "f.png (line 3): the box 30, 0, 11, 10 is not within the frame of 40 x 30" in errors[1]
    assert "(line 4)" in errors[2]


def test_identities_that_look_like_nobody_are_told(tmp_path):
    write_image(tmp_path / "a.png")
    (tmp_path / "list.csv").write_text("image,identity\na.png,0\na.png,nan\na.png,\na.png,ann\n")
    assert list_images(str(tmp_path / "list.csv")).notes == tuple(
        f"identity {name} is taken for a person; where it is nobody, write distractor" for name in ("0", "nan"))


def write_boxes(folder, *boxes, name="b.csv", frame="f.png"):
    (folder / name).write_text("\n".join(["image,x,y,width,height", *(f"{frame},{box}" for box in boxes)]))
    return str(folder / name)


def test_a_box_beyond_its_frame_is_cut_if_asked_for(tmp_path):
    image = Image.fromarray(drawing(40, 30))  # shown as 40 x 30 pixels
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "f.png", exif=exif)
    upright = np.asarray(image.transpose(Image.Transpose.ROTATE_270))
    path = write_boxes(tmp_path, "30,-2.4,11,10", "5,5,9,9", "-20,2,80,80", "40,0,9,9", "37,0,9,9", "-9,0,9,9")
    listed = list_images(path, clip_boxes=True).images
    assert listed[0].box == (30, -2, 11, 10)
    loaded = list(load_images(listed, 10, 10))
    for one, (x, y, width, height), clipped in zip(
            loaded, [(30, 0, 10, 8), (5, 5, 9, 9), (0, 2, 40, 28)], [True, False, True], strict=False):
        assert (one.image.box, one.clipped, one.error) == ((x, y, width, height), clipped, None)
        expected = Image.fromarray(upright[y:y + height, x:x + width]).resize((10, 10), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(one.pixels, expected)
    assert [one.error for one in loaded[3:]] == [
        "f.png (line 5): the box 40, 0, 9, 9 is not within the frame of 40 x 30 pixels",
        "f.png (line 6) has 3 x 9 pixels, which shows nobody",
        "f.png (line 7): the box -9, 0, 9, 9 is not within the frame of 40 x 30 pixels"]
    refused = [one.error for one in load_images(list_images(path).images, 10, 10)]
    assert "(line 2): the box 30, -2, 11, 10 is not within the frame of 40 x 30 pixels (--clip_boxes cuts" in refused[0]
    assert refused[1] is None and "--clip_boxes" in refused[2] and refused[3] == loaded[3].error


def test_a_box_that_was_cut_is_known_by_what_is_left(tmp_path, monkeypatch):
    write_image(tmp_path / "f.jpg", (40, 30))
    path = write_boxes(tmp_path, "30,0,20,10", "5,5,9,9", frame="f.jpg")
    crossing, within = load_images(list_images(path, clip_boxes=True).images, 8, 8)
    cut, same = load_images(list_images(write_boxes(tmp_path, "30,0,10,10", "5,5,9,9", name="c.csv", frame="f.jpg")
                                        ).images, 8, 8)
    assert (crossing.digest, within.digest) == (cut.digest, same.digest) and crossing.digest != within.digest
    known = {crossing.digest, within.digest}
    # Not cut it is another picture, and refused, whatever is known.
    refused, within = load_images(list_images(path).images, 8, 8, known)
    assert "is not within the frame" in refused.error and within.pixels is None
    monkeypatch.setattr(user_images, "open_rgb", None)  # what is known is not decoded
    again = list(load_images(list_images(path, clip_boxes=True).images, 8, 8, known))
    assert [(one.digest, one.clipped) for one in again] == [(cut.digest, True), (same.digest, False)]
    assert all(one.pixels is None and one.error is None for one in again)


def test_damaged_files_are_errors_of_the_user_never_bugs(tmp_path):
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (24, 16, 3), np.uint8))
    wrong = 0
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "ICO", "TGA", "PPM", "JPEG2000"):
        encoded = io.BytesIO()
        noise.save(encoded, kind)
        for _ in range(40):
            damaged = bytearray(encoded.getvalue()[:rng.integers(1, len(encoded.getvalue()))])
            for position in rng.integers(0, len(damaged), 8):
                damaged[position] = rng.integers(256)
            path = tmp_path / f"d.{kind}"
            path.write_bytes(damaged)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result, = load_images([user_images.UserImage(path, "d")], 8, 8)
            wrong += result.error is not None
    assert wrong > 100


@pytest.fixture
def decoded(monkeypatch):
    """The names of the images for which a file has been decoded."""
    names, original = [], user_images.open_rgb
    monkeypatch.setattr(user_images, "open_rgb", lambda data, name, **options: names.append(name)
                        or original(data, name, **options))
    return names


def boxes_of_frames(folder, lines):
    """Images from a CSV whose lines are (frame, x)."""
    for name in {name for name, _ in lines}:
        write_image(folder / name, (40, 30), color=RED if name < "g" else BLUE)
    (folder / "b.csv").write_text("image,x,y,width,height\n" + "".join(f"{name},{x},0,10,10\n" for name, x in lines))
    return list_images(str(folder / "b.csv")).images


def test_frames_decode_once_and_known_images_never(tmp_path, decoded):
    images = boxes_of_frames(tmp_path, [(name, x) for name in ("f.png", "g.png") for x in range(5)])
    results = list(load_images(images, 8, 8))
    assert len(decoded) == 2 and [result.image for result in results] == images
    known = {result.digest for result in results}
    assert len(known) == 10
    assert all(result.pixels is None and not result.error for result in load_images(images, 8, 8, known))
    assert len(decoded) == 2


def test_frames_decode_once_where_their_boxes_lie_apart(tmp_path, decoded, capsys):
    images = boxes_of_frames(tmp_path, [(name, x) for x in (0, 1, 31, 2, 32) for name in ("g.png", "f.png")])
    results = list(load_images(images, 8, 8))
    assert len(decoded) == 2
    # File by file, as they are listed first, and each knows its place in the list.
    assert [result.place for result in results] == [*range(0, 10, 2), *range(1, 10, 2)]
    assert [result.image for result in results] == [images[result.place] for result in results]
    assert all((result.pixels == (BLUE, RED)[result.place % 2]).all() for result in results if not result.error)
    # Bad ones are told in the order of the list.
    bad = r"g.png \(line 6\).*; f.png \(line 7\).*; g.png \(line 10\)"
    with pytest.raises(UserError, match=f"4 of the first 10 images.*{bad}"):
        list(read_batches(images, 8, 8, 4, "reading", keep_going=False))
    read = [one.place for batch, _ in read_batches(images, 8, 8, 4, "reading", keep_going=True) for one in batch]
    assert read == [0, 2, 6, 1, 3, 7]
    assert re.search(bad.replace(";", "\n.*"), capsys.readouterr().err)


def test_images_not_frames_are_counted_that_are_read_ahead(tmp_path, decoded, monkeypatch):
    class AtOnce:
        """In the place of threads, of which nobody knows how far they are."""

        def submit(self, function, *arguments):
            future = Future()
            future.set_result(function(*arguments))
            return future

        def shutdown(self, cancel_futures):
            pass

    monkeypatch.setattr(user_images, "ThreadPoolExecutor", AtOnce)
    images = boxes_of_frames(tmp_path, [(f"{frame}.png", x) for frame in range(50) for x in range(30)])
    reading = load_images(images, 8, 8)
    next(reading)
    assert 200 < len(decoded) * 30 < 700
    assert sum(1 for _ in reading) == len(images) - 1 and len(decoded) == 50


def test_a_crowd_in_one_frame_is_read_in_parts(tmp_path, decoded):
    images = boxes_of_frames(tmp_path, [("f.png", x % 30) for x in range(600)])
    assert [result.place for result in load_images(images, 8, 8)] == list(range(600))
    assert len(decoded) == 3


def test_batches_of_new_images_are_full_among_many_that_are_known(tmp_path):
    x = [30 if place % 400 == 0 else place % 29 for place in range(4000)]  # 10 new, few and far between
    images = boxes_of_frames(tmp_path, [("f.png", each) for each in x])
    known = {loaded.digest for loaded in load_images(images, 8, 8) if loaded.image.box[0] != 30}
    batches = list(read_batches(images, 8, 8, 4, "reading", keep_going=False, known=known))
    assert [len(read) for read, _ in batches if read] == [4, 4, 2]
    assert max(len(seen) for _, seen in batches) < 1500 and sum(len(seen) for _, seen in batches) == 3990


def test_names_that_a_terminal_would_obey_are_escaped():
    assert user_images.printable("a\x1b[2J.png") == r"'a\x1b[2J.png'"
    assert user_images.printable("zoë.png") == "zoë.png"
