"""Lists of words in a text."""


def split_words(text: str) -> list[str]:
    """Return the words between commas, without spaces around them and without empty ones.

    Example:
        >>> split_words("SGD, AdamW,")
        ['SGD', 'AdamW']
    """
    return [word for part in text.split(",") if (word := part.strip())]
