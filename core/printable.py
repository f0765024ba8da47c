"""Text of others in one line of a terminal or a log."""


def printable(text: str) -> str:
    """With escapes in the place of characters that end a line, move the cursor or change colours."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
