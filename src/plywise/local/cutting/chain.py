"""Reads a model as a chain of pieces, each of which passes one value to the next.

A module is opened only if its inside is a part of the chain: a residual block stays one module.
"""

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

from torch import Tensor, fx, nn

from plywise.local.cutting.tracing import FLAG, ChainTracer, StaysWholeError, TrainingFlag, trace


@dataclass(frozen=True)
class Piece:
    """Operations in a row with one value before them and one after.

    Attributes:
        nodes: the operations.
        source: what makes the value before.
        result: what makes the value after.
        crossing: the first place inside where several values cross, in words; may be empty.
    """

    nodes: tuple[fx.Node, ...]
    source: fx.Node
    result: fx.Node
    crossing: str = ""

    @property
    def label(self) -> str:
        """The name of its beginning for messages."""
        return label(self.nodes[0])

    def __add__(self, following: "Piece") -> "Piece":
        """Join it with the piece that follows."""
        return Piece(self.nodes + following.nodes, self.source, following.result)

    def name_parameters(self, model: nn.Module) -> set[str]:
        """Return the parameters and buffers that it uses, by the names that they have in the model."""
        return {name for name, _ in collect_tensors(model, self.nodes)}

    def assemble(self, model: nn.Module) -> nn.Module:
        """Make a module that does what the piece does, on the model's own modules.

        Its parameters have the names that they have in the model. Where modules follow one another it is an
        `nn.Sequential`, of more of them where they are nested; else a `torch.fx.GraphModule`.
        """
        block = _sequential(model, self) or _graph_module(model, self)
        theirs = set(model.modules())
        for part in block.modules():
            if part not in theirs:
                part.training = model.training
        return block


def read_chain(model: nn.Module) -> tuple[list[Piece], list[str]]:
    """Read a model as a chain. The model stays as it is.

    Returns:
        The pieces, first to last, and why they are not smaller, place by place.

    Raises:
        StaysWholeError: the model cannot be traced faithfully, takes or returns more than one tensor, has
            hooks, or has parameters that it does not use.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)))
        >>> [label(piece.result) for piece in read_chain(model)[0]]
        ["'0'", "'1.0'", "'1.1'", "'1.2'"]
    """
    reasons: list[str] = []
    _, opened = _survey(model, "", reasons)
    return cut_pieces(trace(model, opened)), reasons


def cut_pieces(graph: fx.Graph) -> list[Piece]:
    """Cut a graph wherever a single value crosses.

    Raises:
        StaysWholeError: the graph returns something else than one value.
    """
    *nodes, output = graph.nodes
    result = output.args[0]
    if not isinstance(result, fx.Node):
        raise StaysWholeError(f"it returns a {type(result).__name__}, not one tensor")
    place = {node: number for number, node in enumerate([*nodes, output])}
    last = {node: max((place[user] for user in node.users), default=-1) for node in nodes}
    pieces: list[Piece] = []
    alive, source, start, crossing = {nodes[0]}, nodes[0], 1, ""
    for number, node in list(enumerate(nodes))[1:]:
        alive = {value for value in (*alive, node) if last[value] > number}
        if len(alive) == 1:
            (value,) = alive
            pieces.append(Piece(tuple(nodes[start : number + 1]), source, value, crossing))
            source, start, crossing = value, number + 1, ""
            continue
        values = [value for value in nodes[: number + 1] if value in alive and value.op != "get_attr"]
        if not crossing and len(values) > 1:
            names = ", ".join(label(value) for value in values)
            crossing = f"more than one tensor crosses after {label(node)}: {names}"
    return pieces


def label(node: fx.Node) -> str:
    """Return the name of an operation for messages: the module's path, or the name of the function."""
    if node.op == "placeholder":
        return "the input"
    return repr(node.target if node.op == "call_module" else node.name)


def collect_tensors(model: nn.Module, nodes: Iterable[fx.Node]) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of the model that some operations use, by name."""
    for node in nodes:
        if node.op not in ("call_module", "get_attr") or node.target == FLAG:
            continue
        found = operator.attrgetter(str(node.target))(model)
        if isinstance(found, nn.Module):
            for name, tensor in (*found.named_parameters(), *found.named_buffers()):
                yield f"{node.target}.{name}", tensor
        elif isinstance(found, Tensor):
            yield str(node.target), found


def learns(model: nn.Module, nodes: Iterable[fx.Node]) -> bool:
    """Return whether some operations have parameters."""
    return any(isinstance(tensor, nn.Parameter) for _, tensor in collect_tensors(model, nodes))


def _survey(module: nn.Module, path: str, reasons: list[str]) -> tuple[int, set[nn.Module]]:
    """Return how many pieces with parameters a module has, and which modules are to be opened to see them."""
    name = f"{path!r} ({type(module).__name__})" if path else f"the model ({type(module).__name__})"
    whole = int(any(True for _ in module.parameters())), set[nn.Module]()
    try:
        pieces = _look_into(module)
    except StaysWholeError as error:
        if not path:
            raise
        if any(True for _ in module.children()):
            reasons.append(f"{name} stays whole: {error}")
        return whole
    count, opened = 0, {module}
    for piece in pieces:
        if piece.crossing and sum(learns(module, [node]) for node in piece.nodes) > 1:
            reasons.append(f"in {name} {piece.crossing}")
        if _is_row(piece):
            target = str(piece.nodes[0].target)
            inside = _survey(module.get_submodule(target), f"{path}.{target}".lstrip("."), reasons)
            count, opened = count + inside[0], opened | inside[1]
        else:
            count += learns(module, piece.nodes)
    return (count, opened) if count > 1 or not path else whole


def _look_into(module: nn.Module) -> list[Piece]:
    """Return the pieces of a module with its children as they are."""
    if fx.Tracer().is_leaf_module(module, ""):
        raise StaysWholeError("it is a layer of torch's own")
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(module, name) for name in hooks):
        raise StaysWholeError(
            "it has hooks, which would not run any more (add hooks and rules after splitting)"
        )
    if "forward" in vars(module) or type(module).__call__ is not nn.Module.__call__:
        raise StaysWholeError("its forward has been replaced")
    graph = trace(module, {module})
    used = {tensor for _, tensor in collect_tensors(module, graph.nodes)}
    if unused := [name for name, parameter in module.named_parameters() if parameter not in used]:
        raise StaysWholeError(f"its forward does not use its parameter {unused[0]!r}: no block would hold it")
    return cut_pieces(graph)


def _is_row(piece: Piece) -> bool:
    """Return whether a piece is modules that follow one another."""
    befores = (piece.source, *piece.nodes)
    return piece.result is piece.nodes[-1] and all(
        node.op == "call_module" and node.args == (before,) and not node.kwargs
        for before, node in zip(befores, piece.nodes, strict=False)
    )


def _sequential(model: nn.Module, piece: Piece) -> nn.Sequential | None:
    if not _is_row(piece):
        return None
    targets = [str(node.target) for node in piece.nodes]
    return _nest([(target.split("."), model.get_submodule(target)) for target in targets])


def _nest(row: list[tuple[list[str], nn.Module]]) -> nn.Sequential | None:
    """Sequentials in which each module has its path; None where that would change their order."""
    parts: dict[str, nn.Module] = {}
    for name, group in groupby(row, key=lambda entry: entry[0][0]):
        inner = [(path[1:], module) for path, module in group]
        part: nn.Module | None
        if all(path for path, _ in inner):
            part = _nest(inner)
        else:
            part = inner[0][1] if len(inner) == 1 else None
        if part is None or name in parts or hasattr(nn.Sequential, name):
            return None
        parts[name] = part
    sequential = nn.Sequential()
    for name, child in parts.items():
        sequential.add_module(name, child)
    return sequential


def _graph_module(model: nn.Module, piece: Piece) -> fx.GraphModule:
    graph = fx.Graph(tracer_cls=ChainTracer)  # which reads the block's code when it is unpickled
    copies = {piece.source: graph.placeholder("input")}
    for node in piece.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        copies[node].meta.clear()
    graph.output(copies[piece.result])
    root = nn.Module()  # the model, but for a flag; parameters keep the order in which they are used
    vars(root).update({**vars(model), "_modules": {**model._modules, FLAG: TrainingFlag()}})
    return fx.GraphModule(root, graph, class_name="Block")
