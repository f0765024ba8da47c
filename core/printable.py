"""Which text fits into one line of a terminal or a log, and which into a header."""


def printable(text: str) -> str:
    """With escapes in the place of characters that end a line, move the cursor or change colours."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def is_header_text(text: str) -> bool:
    """Whether it can be the value of a header, or of gRPC's metadata, and arrives as it was."""
    return text.isascii() and text.isprintable() and text == text.strip()
