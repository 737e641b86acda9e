"""Extract the graph from the export formats of ComfyUI's editor, API and hosted services."""

from __future__ import annotations

from workflows.graph_inputs import refuse

# Keys that wrap the graph: in the body of POST /prompt, in that of hosted ComfyUIs, and in the
# result of the editor's graphToPrompt, whose `workflow` has the editor's own format.
_WRAPPERS = ("prompt", "output", "input", "workflow", "graph")
_MAX_DEPTH = 4


def graph_of_export(sent: object) -> object:
    """Return the graph in API format from inside its wrappers; other values come back unchecked.

    Raises GraphRefused for the format in which the editor saves.
    """
    found = sent
    for _ in range(_MAX_DEPTH):
        if not isinstance(found, dict) or any(map(_is_node, found.values())):
            break
        if isinstance(found.get("nodes"), list):
            refuse(
                None,
                "this is a workflow in the format in which ComfyUI's editor saves it; use "
                "Export (API) in the editor and send that file",
            )
        inner = [found[name] for name in _WRAPPERS if isinstance(found.get(name), dict)]
        if not inner:
            break
        found = inner[0]
    return found


def _is_node(value: object) -> bool:
    return isinstance(value, dict) and "class_type" in value
