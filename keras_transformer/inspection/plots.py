"""Pictures of attention, with matplotlib."""

import io


def plot_heads(weights, queries, keys, title):
    """A figure with a map `[T, S]` for each of the heads of `weights` `[heads, T, S]`, which notebooks show."""
    from matplotlib.figure import Figure

    class ShownFigure(Figure):
        def _repr_png_(self):
            file = io.BytesIO()
            self.savefig(file, format="png", bbox_inches="tight")
            return file.getvalue()

    columns = min(4, len(weights))
    rows = -(-len(weights) // columns)
    edge = 2.2 + 0.12 * max(weights.shape[1:])
    figure = ShownFigure(figsize=(edge * columns, edge * rows), layout="constrained")
    figure.suptitle(title)
    for head, (axes, image) in enumerate(
        zip(figure.subplots(rows, columns, squeeze=False).flat, weights, strict=False)
    ):
        shown = axes.imshow(image, cmap="Blues", vmin=0, vmax=1)
        axes.set_title(f"head {head}", fontsize="medium")
        for axis, names in ((axes.xaxis, keys), (axes.yaxis, queries)):
            every = -(-len(names) // 16)
            axis.set_ticks(range(0, len(names), every), names[::every], fontsize="x-small")
        axes.tick_params(axis="x", rotation=60)
    for axes in figure.axes[len(weights) :]:
        axes.set_axis_off()
    figure.colorbar(shown, ax=figure.axes, shrink=0.6, label="weight")
    return figure
