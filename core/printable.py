"""Text that is safe in one line of a terminal or a log, and text that can be sent in a header."""


def printable(text: str) -> str:
    """`text` with escapes in place of characters that end a line, move the cursor or change colours."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def is_header_text(text: str) -> bool:
    """Whether `text` can be the value of a header or of gRPC metadata, and arrives unchanged."""
    return text.isascii() and text.isprintable() and text == text.strip()
