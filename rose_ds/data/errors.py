"""The one error type of this folder."""


class DataError(ValueError):
    """Data is missing, malformed or unreachable; the message names the file, line or setting and the way out."""
