"""The order of the gallery: the main methods first, from the one to begin with."""

from sphinx_gallery.sorting import FileNameSortKey

MAIN = (
    "recommended",
    "proxprop",
    "back_matching",
    "consequentialism",
    "split",
    "associated_learning",
    "local_learners",
    "local_next_token",
)


class MainFirst(FileNameSortKey):
    """Sorts file names: those of `MAIN`, then the others."""

    def __call__(self, filename):
        """Where a file comes."""
        name = filename.removeprefix("plot_").removesuffix(".py")
        return (MAIN.index(name) if name in MAIN else len(MAIN), filename)
