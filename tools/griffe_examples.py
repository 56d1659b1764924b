"""An extension of griffe that turns docstrings' examples into blocks of code in the documentation."""

import griffe


class Examples(griffe.Extension):
    """The extension that fences the examples of every docstring."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """Fences the examples of an object that griffe has read."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(text: str) -> str:
    """Returns the text with each paragraph that begins with a doctest prompt as a fenced block."""
    paragraphs = text.split("\n\n")
    return "\n\n".join(f"```pycon\n{part}\n```" if part.lstrip().startswith(">>>") else part for part in paragraphs)
