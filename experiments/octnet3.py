"""The networks of the paper's table 2: layers, bounds, capacities and parameters, sparse and dense.

python -m experiments.octnet3                   # all six, in seconds: nothing runs
python -m experiments.octnet3 --resolutions 64
python -m experiments.octnet3 --report          # writes experiments/results/octnet3.md
"""

import argparse

from flax import nnx
from rich.console import Console

from experiments import frame
from experiments.frame import Cells, summary_table
from ilajax.models import OctNet3
from ilajax.models.octnet3 import TABLE_2

CLASSES = {24: 10}  # MNIST; the others ModelNet40


def main(arguments: list[str] | None = None) -> str:
    """Prints the summaries; returns them as markdown."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.report and options.resolutions != list(TABLE_2):
        parser.error("--report writes the page of all networks: leave out --resolutions")
    nets = {resolution: abstract(resolution) for resolution in options.resolutions}
    totals = _totals(nets)
    sections = [
        f"## OctNet3-{_grid(resolution)}, {CLASSES.get(resolution, 40)} classes\n\n"
        f"```\n{net.summary()}\n```"
        for resolution, net in nets.items()
    ]
    head = (
        "`python -m experiments.octnet3 --report`. Outputs and bytes are those of one sample in float32, "
        "parameters those before any pruning, bounds the defaults of `ilajax.models.OctNet3`."
    )
    table = "\n".join(frame.markdown_table(totals))
    text = "\n\n".join(["# OctNet3", head, table, *sections]) + "\n"
    console = Console()
    for section in sections:
        console.print(section.replace("```", "").strip(), soft_wrap=True, highlight=False)
    console.print(summary_table(totals))
    if options.report:
        frame.write_text(options.report / "octnet3.md", text)
        console.print(f"wrote {options.report / 'octnet3.md'}")
    return text


def abstract(resolution: int, *, dense: bool = False) -> OctNet3:
    """The net with the paper's bounds, in shapes alone: that of 256^3 has 26 million weights."""
    classes = CLASSES.get(resolution, 40)
    return nnx.eval_shape(
        lambda: OctNet3(resolution, num_classes=classes, dense=dense, rngs=nnx.Rngs(0))
    )


def _totals(nets: dict[int, OctNet3]) -> list[Cells]:
    """A line for each net: its parameters, and the activations of a sample beside its dense twin's."""
    cells: list[Cells] = [
        ("network", "bounds", "parameters", "of the sparse layers", "activations", "dense twin")
    ]
    for resolution, net in nets.items():
        layers, twin = net.layers(), abstract(resolution, dense=True).layers()
        sparse = sum(layer.parameters for layer in layers if layer.density_bound is not None)
        stored, dense = (sum(layer.bytes for layer in each) for each in (layers, twin))
        parameters = (sum(layer.parameters for layer in layers), sparse)
        bounds = ", ".join(f"{bound:g}" for bound in TABLE_2[resolution].density_bounds)
        sizes = (f"{size / 1e6:.2f} MB" for size in (stored, dense))
        named = (f"OctNet3-{_grid(resolution)}", bounds)
        cells.append((*named, *(f"{count:,}" for count in parameters), *sizes))
    return cells


def _grid(resolution: int) -> str:
    return f"{resolution}^{len(TABLE_2[resolution].input_shape)}"


def _parser() -> argparse.ArgumentParser:
    parser = frame.parser("experiments.octnet3", __doc__)
    known = list(TABLE_2)
    help = f"of {', '.join(map(str, known))}"
    parser.add_argument(
        "--resolutions", type=int, choices=known, nargs="+", default=known, metavar="R", help=help
    )
    frame.add_report(parser, "octnet3.md, which needs all resolutions,")
    return parser


if __name__ == "__main__":
    frame.run(main)
