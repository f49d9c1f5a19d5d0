"""What must not be printed or stored: passwords and signatures in URLs."""

import re

_USER = re.compile(r"(\w://)[^\s/@?#\"']+@")
_VALUE = re.compile(
    r"([?&;][\w.\-%]*(?:sig|token|key|secret|passw|pwd|credential|auth)[\w.\-%]*=)[^\s&;#\"')]+",
    re.IGNORECASE,
)


def masked(text: str) -> str:
    """The text with *** for user and password, and for values such as signatures and tokens, of the URLs in it."""
    if "://" not in text:
        return text
    return _VALUE.sub(r"\1***", _USER.sub(r"\1***@", text))
