"""An object whose unpickling runs code."""


class Trap:
    """Unpickling it calls `function` with `argument`."""

    def __init__(self, function, argument):
        self.function, self.argument = function, argument

    def __reduce__(self):
        return self.function, (self.argument,)
