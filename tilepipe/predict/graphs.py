"""What a network's traced graph says of its modules: who reads whom; and putting one module in another's place."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from torch import fx, nn

from tilepipe.models.pooling import Unpool


class _Tracer(fx.Tracer):
    def __init__(self, whole: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self.whole = whole

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return self.whole(module) or super().is_leaf_module(module, name)


def traced(network: nn.Module, whole: Callable[[nn.Module], bool] = lambda _: False) -> fx.Graph | None:
    """The graph of a network's calls, without those inside of modules that are `whole`; None where it has none."""
    try:
        return _Tracer(whole).trace(network)
    except Exception:  # networks run arbitrary code while they are traced, and may raise anything
        return None


def pairs_pools(network: nn.Module) -> bool:
    """Whether all that reads where maxima were found puts values there."""
    unpools = [module for module in network.modules() if isinstance(module, Unpool)]
    return bool(unpools) and all(module.how == "unpool" for module in unpools)


def replace_module(network: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts `new`, in evaluation mode, wherever the network holds `old`."""
    modules = dict(network.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        if module is old:
            parent, _, child = name.rpartition(".")
            setattr(modules[parent], child, new.eval())


def calls_of(graph: fx.Graph, modules: dict[str, nn.Module]) -> dict[nn.Module, list[fx.Node]]:
    """The calls of each module in a traced graph."""
    calls: dict[nn.Module, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.op == "call_module":
            calls[modules[str(node.target)]].append(node)
    return calls


def modules_read(graph: fx.Graph, modules: dict[str, nn.Module]) -> set[nn.Module]:
    """The modules whose parameters a traced network reads by name."""
    owners = (str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr")
    return {modules[name] for name in owners if name in modules}


def has_hooks(module: nn.Module) -> bool:
    """Whether something listens to a module's calls."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


class Joins:
    """Which module alone reads what another one gives."""

    def __init__(self, modules: dict[str, nn.Module], calls: dict[nn.Module, list[fx.Node]]) -> None:
        self.modules, self.calls = modules, calls

    def follower(self, module: nn.Module) -> nn.Module | None:
        """The one module whose every call reads a result of `module` first, and that reads all of them; else None."""
        readers = [self._reader(node) for node in self.calls[module]]
        found = {self.modules[str(reader.target)] for reader in readers if reader is not None}
        if len(found) != 1 or None in readers:
            return None
        (reader,) = found
        return reader if len(self.calls[reader]) == len(readers) else None

    def _reader(self, node: fx.Node) -> fx.Node | None:
        """The call that alone reads a result, identities left out."""
        while len(users := readers(node)) == 1:
            (user,) = users
            if user.op != "call_module" or [n for n, given in enumerate(user.args) if given is node] != [0]:
                return None
            if type(self.modules[str(user.target)]) is not nn.Identity:
                return user
            node = user
        return None


def readers(node: fx.Node) -> list[fx.Node]:
    """What reads a result, and not its shape only."""
    return [user for user in node.users if user.target is not getattr or user.args[1:] != ("shape",)]
