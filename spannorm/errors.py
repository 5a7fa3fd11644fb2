"""The error of an argument that cannot work."""


class InvalidArgument(ValueError):
    """An argument was given a value that cannot work.

    The message is one line: `alpha=-1 is not valid: expected a number > 0`.

    Attributes:
        name: name of the argument.
        value: value that it was given.
        valid: what would have been accepted, in words.
    """

    def __init__(self, name: str, value: object, valid: str) -> None:
        self.name, self.value, self.valid = name, value, valid
        super().__init__(f"{name}={value!r} is not valid: expected {valid}")

    def __reduce__(self) -> tuple[type["InvalidArgument"], tuple[str, object, str]]:
        return type(self), (self.name, self.value, self.valid)
