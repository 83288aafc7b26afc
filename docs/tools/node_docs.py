"""Writes what ComfyUI shows about our nodes, from their schemas, so that it cannot differ from them:

- locales/en/nodeDefs.json and main.json, the English texts that translations start from;
- the tables under "Inputs" and "Outputs" of the help pages web/docs/<node id>.md; the rest is written by hand.

    python -P docs/tools/node_docs.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FOLDER, NAME = "flux-kit", "Flux Kit"  # the folder that installers of packs make, and what to call it
HEADINGS = ("Inputs", "Outputs")
TYPES = {"INT": "whole number", "FLOAT": "number", "STRING": "text", "BOOLEAN": "yes or no"}


def node_defs(nodes: Iterable[Any]) -> dict[str, Any]:
    """Texts of each node class, by the keys that ComfyUI's frontend looks up."""
    found: dict[str, Any] = {}
    for schema in (node.GET_SCHEMA() for node in nodes):
        found[schema.node_id] = {
            "display_name": schema.display_name, "description": schema.description,
            "inputs": {spec.id: {"name": spec.display_name or spec.id, "tooltip": spec.tooltip}
                       for spec in schema.inputs},
            "outputs": {str(index): {"name": output.display_name or output.id, "tooltip": output.tooltip}
                        for index, output in enumerate(schema.outputs)}}
    return found


def main_texts(nodes: Iterable[Any]) -> dict[str, Any]:
    """Parts of the nodes' menu paths, and the pack's name over its templates."""
    menus = {part: part for node in nodes for part in node.GET_SCHEMA().category.split("/")}
    return {"nodeCategories": menus, "templateWorkflows": {"category": {FOLDER: NAME}}}


def takes(spec: Any, files: Iterable[str]) -> str:
    """What an input takes: the type of a socket; kind, range and default of a widget."""
    kind = TYPES.get(spec.io_type, spec.io_type)
    if spec.io_type == "COMBO":
        kind = "a file" if spec.id in files else "one of " + ", ".join(f"`{choice}`" for choice in spec.options or ())
    low, high = getattr(spec, "min", None), getattr(spec, "max", None)
    parts = [kind] if low is None else [kind, f"{low} to {high}"]
    default = getattr(spec, "default", None)
    if default not in (None, ""):
        parts.append(f"default `{default}`")
    if spec.optional:
        parts.append("optional")
    return ", ".join(parts)


def tables(node: Any) -> dict[str, str]:
    """Markdown of the two generated sections of a help page, by heading."""
    schema, files = node.GET_SCHEMA(), getattr(node, "KINDS", {})
    inputs = [f"| `{spec.display_name or spec.id}` | {takes(spec, files)} | {spec.tooltip} |" for spec in schema.inputs]
    outputs = [f"| `{output.display_name or output.id}` | {TYPES.get(output.io_type, output.io_type)} | "
               f"{output.tooltip} |" for output in schema.outputs]
    rows = {"Inputs": ["| input | takes | what it is |", "|---|---|---|", *inputs],
            "Outputs": ["| output | type | what it is |", "|---|---|---|", *outputs]}
    return {heading: "\n".join(lines) if len(lines) > 2 else "None." for heading, lines in rows.items()}


def help_page(text: str, node: Any) -> str:
    """The page with its generated sections made anew; what has no such heading stays as it is."""
    for heading, table in tables(node).items():
        text = re.sub(rf"^(## {heading}\n).*?(?=^## |\Z)", lambda found, body=table: f"{found[1]}\n{body}\n\n", text,
                      flags=re.DOTALL | re.MULTILINE)
    return text


def generated(nodes: list[Any], root: Path = ROOT) -> dict[Path, str]:
    """Every generated file with the text it should have. A help page must be there to be completed."""
    english = root / "locales" / "en"
    files = {english / "nodeDefs.json": node_defs(nodes), english / "main.json": main_texts(nodes)}
    texts = {path: json.dumps(value, indent=2, ensure_ascii=False) + "\n" for path, value in files.items()}
    for node in nodes:
        page = root / "web" / "docs" / f"{node.GET_SCHEMA().node_id}.md"
        if page.is_file():
            texts[page] = help_page(page.read_text(encoding="utf-8"), node)
    return texts


def standalone_nodes() -> list[Any]:
    """Our node classes in a host without a single model file."""
    from flux_kit import hosts
    from flux_kit.hosts.standalone.folders import Folders
    from flux_kit.hosts.standalone.host import StandaloneHost
    hosts.use(StandaloneHost(Folders(models=[], input=[], output=Path("output"), temp=Path("output")), device="cpu"))
    from flux_kit.nodes import NODES
    return list(NODES)


def main() -> None:
    for path, text in generated(standalone_nodes()).items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8", newline="\n")
            print(f"wrote {path.relative_to(ROOT).as_posix()}")


if __name__ == "__main__":
    main()
