"""YAML as plain data: no tags, no aliases, no key twice, bounded in depth; no file runs code or takes memory."""

from typing import Any

import yaml

_MAX_DEPTH = 20


class YamlError(ValueError):
    """The text is not plain YAML; the message is one line."""


class _PlainLoader(yaml.SafeLoader):
    """Refuses numbers beyond 64 bits, and a key that is given twice, of which YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is not None and key in seen:
                raise YamlError(f"the key {key[:80]!r} is given twice (line {key_node.start_mark.line + 1})")
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        number = super().construct_yaml_int(node)
        if abs(number) >= 2**63:
            raise YamlError(f"the number {node.value[:20]}... does not fit into 64 bits")
        return number


_PlainLoader.add_constructor("tag:yaml.org,2002:int", _PlainLoader.construct_yaml_int)


def parse_yaml(text: str) -> Any:
    """Parse a YAML text into dicts, lists and scalars.

    Raises:
        YamlError: Anything else.
    """
    try:
        _check_events(text)
        return yaml.load(text, Loader=_PlainLoader)
    except YamlError:
        raise
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        # ValueError: 2020-13-45 is a date to YAML, 0x a number.
        raise YamlError(" ".join(str(error).split())[:300] or type(error).__name__) from None


def _check_events(text: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            # Aliases let a few bytes expand without bound, and no recipe needs them.
            raise YamlError("aliases ('*name') are not supported; write the value out")
        if getattr(event, "tag", None) is not None:
            raise YamlError(f"tags ('{event.tag[:80]}') are not supported; write a plain value")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        # Before the parser gets slow: its time grows with length times depth.
        if depth > _MAX_DEPTH:
            raise YamlError(f"nested deeper than {_MAX_DEPTH} levels")
