"""A figure of matplotlib that a notebook shows, whether or not pyplot has been imported there."""

from io import BytesIO

from matplotlib.figure import Figure


class ShownFigure(Figure):
    """A figure that is drawn as the result of a cell."""

    def _repr_png_(self) -> bytes:
        image = BytesIO()
        self.savefig(image, format="png")
        return image.getvalue()
