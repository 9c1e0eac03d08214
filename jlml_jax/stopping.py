"""Leaving a long job in order when the machine or the user asks for it."""

import signal


class StopRequest:
    """While entered, a first SIGTERM or SIGINT is only noted in `requested`; a second one ends the process at once.

    In a notebook, where SIGINT is a KeyboardInterrupt, the second one is that.
    """

    requested: signal.Signals | None = None

    def __enter__(self) -> "StopRequest":
        self._handlers = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._handlers[number] = signal.signal(number, self._note)
            except ValueError:  # not in the main thread, where Python allows no handlers
                break
        return self

    def _note(self, number, _frame):
        self.requested = signal.Signals(number)
        for each, handler in self._handlers.items():
            signal.signal(each, handler if handler is signal.default_int_handler else signal.SIG_DFL)

    def __exit__(self, *_):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
