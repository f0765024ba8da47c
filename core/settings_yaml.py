"""YAML as settings are written in it: numbers as in YAML 1.2, and bounded work for a text of any content."""

import itertools
import math
import re
from typing import NoReturn

import yaml

_MAX_VALUES = 20_000
_MAX_EXPANDED_VALUES = 100_000  # with each alias (*x) counted as a copy of its anchor (&x)
_MAX_DEPTH = 40
_MAX_DIGITS = 40
_LARGEST_INT = (1 << 63) - 1
_INT, _FLOAT, _TEXT = (f"tag:yaml.org,2002:{name}" for name in ("int", "float", "str"))
_VALUE = "tag:yaml.org,2002:value"  # which YAML 1.1 reads in a "="


class UnreasonableYamlError(yaml.MarkedYAMLError):
    """YAML that would take long or much memory to read. `problem` is a sentence for users."""


class SettingsLoader(yaml.SafeLoader):
    """Reads numbers as YAML 1.2's core schema does. PyYAML reads YAML 1.1, where 1e1 is text and 017 is 15.

    Bounds the work for a file of any content: PyYAML's is quadratic in the depth, and exponential in aliases.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._num_values = 0

    def fetch_flow_collection_start(self, token_class: type[yaml.Token]) -> None:
        self._check_depth(self.flow_level)
        super().fetch_flow_collection_start(token_class)

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._depth += 1
        self._num_values += 1
        self._check_depth(self._depth)
        self._check_tag()
        if self._num_values > _MAX_VALUES:
            self._refuse(f"has more than {_MAX_VALUES:,} values")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def get_single_node(self) -> yaml.Node | None:
        root = super().get_single_node()
        if root is not None and _expanded_values(root) > _MAX_EXPANDED_VALUES:
            raise UnreasonableYamlError(
                problem="has aliases (*name) that stand for too many values, or for themselves",
                problem_mark=root.start_mark,
            )
        return root

    def _check_depth(self, depth: int) -> None:
        if depth > _MAX_DEPTH:
            self._refuse("is nested too deeply")

    def _check_tag(self) -> None:
        """PyYAML's constructors fail in many ways at a tag that does not fit its value."""
        event: yaml.Event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.CollectionStartEvent | yaml.ScalarEvent) and event.tag not in (None, "!", _TEXT):
            problem = "YAML tags ('!...') are not allowed"
            raise UnreasonableYamlError(problem=problem, problem_mark=event.start_mark)  # type: ignore[arg-type]

    def _refuse(self, problem: str) -> NoReturn:
        raise UnreasonableYamlError(problem=problem, problem_mark=self.get_mark())


def _expanded_values(root: yaml.Node) -> float:
    """Number of values, with each alias counted as a copy; infinite if one stands in its own anchor."""
    counts: dict[int, float] = {}

    def count(node: yaml.Node) -> float:
        if id(node) not in counts:
            counts[id(node)] = math.inf  # while its children are counted
            children = () if isinstance(node, yaml.ScalarNode) else node.value
            if isinstance(node, yaml.MappingNode):
                children = itertools.chain.from_iterable(children)
            counts[id(node)] = 1 + sum(map(count, children))
        return counts[id(node)]

    return count(root)


class SettingsDumper(yaml.SafeDumper):
    """Quotes text that `SettingsLoader` would read as a number."""


for _class in (SettingsLoader, SettingsDumper):
    _class.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INT, _FLOAT, _VALUE)]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _class.add_implicit_resolver(_INT, re.compile(r"[-+]?[0-9]+$|0o[0-7]+$|0x[0-9a-fA-F]+$"), list("-+0123456789"))
    _class.add_implicit_resolver(
        _FLOAT,
        re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"),
        list("-+.0123456789"),
    )


def _int(_: yaml.Loader, node: yaml.ScalarNode) -> int:
    if len(node.value) <= _MAX_DIGITS:
        value = int(node.value, 0 if node.value.startswith(("0o", "0x")) else 10)
        if abs(value) <= _LARGEST_INT:
            return value
    raise UnreasonableYamlError(
        problem="has a number with too many digits; put text in quotes", problem_mark=node.start_mark
    )


SettingsLoader.add_constructor(_INT, _int)
