"""Refusals: why a design model has no proved exact filter, and where."""


class NotLinearGaussian(ValueError):
    """The model was not proved linear-Gaussian.

    Attributes:
        function: the design model's function at fault ("prior", "transition", ...).
        site: the sample site at fault, or "" where the fault is not a site's.
        reason: what is wrong, and the remedy where there is one.
        location: "file.py:12" of the site or expression, or "" where unknown.
    """

    def __init__(self, function: str, site: str, reason: str, location: str = "") -> None:
        self.function = function
        self.site = site
        self.reason = reason
        self.location = location
        where = f"`{function}`" + (f", site '{site}'" if site else "")
        super().__init__(f"{where}: {reason}" + (f" ({location})" if location else ""))


class NotSupported(NotLinearGaussian):
    """The model may well be linear-Gaussian, but lies outside what is proved here."""
