"""Which folder of the package imports which: the matrix, the counts of modules and lines, and a picture of them.

    python -m tests.import_graph --write docs/images/architecture.svg

Every import counts, also inside functions and under TYPE_CHECKING. tests/test_repo_rules.py checks the order.
"""

from __future__ import annotations

import argparse
import ast
import graphlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "xtf_plugin"
SHARED = ("errors", "_version", "fields", "files", "environment")  # modules that any other may import
HOLDS = {  # the parts in their order: each imports the shared modules and those before it
    "data": "documents, their tokens and text",
    "scorers": "the interface of a scorer, and one file for each",
    "config": "the `xtf:` block",
    "store": "scores on disk",
    "selection": "from scores to kept and dropped tokens",
    "scoring": "the reference model, and running it",
    "plan": "from documents to masks",
    "report": "summary, score table, page, terminal",
    "training": "the plan inside a trainer",
    "hosts": "stock TRL and Axolotl",
    "cli": "`xtf ...`",
}
LAST = ("cli_axolotl", "testing")  # nothing imports them; counted with `cli`


@dataclass(frozen=True)
class Import:
    """One import statement: the modules on both ends, by dotted names without the package, and its line."""

    importer: str
    imported: str
    path: Path
    line: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.importer} imports {self.imported}"


def part_of(module: str) -> str:
    """The folder or top-level module that a module belongs to; "shared" for those that any other may import."""
    first = module.split(".")[0]
    return "shared" if first in ("", *SHARED) else "cli" if first in LAST else first


def modules(package: Path = PACKAGE) -> dict[str, Path]:
    """Every module of a package by its dotted name without the package; the package's own `__init__` is ""."""
    paths = {path: path.relative_to(package).with_suffix("").parts for path in sorted(package.rglob("*.py"))}
    return {".".join(part for part in parts if part != "__init__"): path for path, parts in paths.items()}


def imports(package: Path = PACKAGE) -> list[Import]:
    """Every import of one module of a package by another.

    Imports in the package's own `__init__` do not count: it resolves public names on first use.
    """
    known, found = modules(package), []
    for name, path in known.items():
        if not name:
            continue
        inside = (package.name, *path.relative_to(package).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                home = ".".join(inside[: len(inside) - node.level]) if node.level else ""
                source = ".".join(part for part in (home, node.module) if part)
                targets = [f"{source}.{alias.name}" for alias in node.names]
            else:
                continue
            for target in targets:
                if target.split(".")[0] == package.name and (module := _module(target, package.name, known)) != name:
                    found.append(Import(name, module, path, node.lineno))
    return found


def _module(target: str, package: str, known: dict[str, Path]) -> str:
    """The module that an imported name is, or is defined in."""
    inside = target.partition(".")[2]
    while inside and inside not in known:
        inside = inside.rpartition(".")[0]
    return inside


def against_order(found: list[Import]) -> list[str]:
    """Imports of a part that comes later in HOLDS, of an unknown part, or out of the shared modules."""
    place = {"shared": -1, **{name: number for number, name in enumerate(HOLDS)}}
    bad = (
        each
        for each in found
        if part_of(each.importer) not in place
        or part_of(each.imported) not in place
        or place[part_of(each.imported)] > place[part_of(each.importer)]
    )
    return [str(each) for each in bad]


def circle(found: list[Import]) -> list[str]:
    """The modules of one circle of imports, if there is any."""
    graph: dict[str, set[str]] = {}
    for each in found:
        graph.setdefault(each.importer, set()).add(each.imported)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def counts(package: Path = PACKAGE) -> tuple[Counter[str], Counter[str]]:
    """How many modules and lines each part has."""
    files: Counter[str] = Counter()
    lines: Counter[str] = Counter()
    for name, path in modules(package).items():
        files[part_of(name)] += 1
        lines[part_of(name)] += len(path.read_text(encoding="utf-8").splitlines())
    return files, lines


def matrix(found: list[Import]) -> Counter[tuple[str, str]]:
    """How many import statements lead from one part to another."""
    pairs = ((part_of(each.importer), part_of(each.imported)) for each in found)
    return Counter((a, b) for a, b in pairs if a != b)


def table(package: Path = PACKAGE) -> str:
    """The matrix and the counts as text: a row for each importer, a column for each part that it imports."""
    names, (files, lines), used = ("shared", *HOLDS), counts(package), matrix(imports(package))
    width = max(map(len, names))
    rows = [f"{'part':<{width}} {'modules':>7} {'lines':>7} " + " ".join(f"{name[:6]:>6}" for name in names)]
    for name in names:
        cells = " ".join(f"{used[name, other] or '':>6}" for other in names)
        rows.append(f"{name:<{width}} {files[name]:>7} {lines[name]:>7} {cells}".rstrip())
    rows.append(f"{'all':<{width}} {files.total():>7} {lines.total():>7}")
    return "\n".join(rows)


def picture(package: Path = PACKAGE) -> str:
    """The parts as boxes on a diagonal, an SVG: a dot says that the part of its row imports the part of its column."""
    names, used = ("shared", *HOLDS), matrix(imports(package))
    shared = ", ".join(name for name in SHARED if name in modules(package))
    across, down, box, left, top = 48, 44, 86, 16, 16
    middle, bottom = left + box // 2, top + len(names) * down
    lines, marks = [], []
    for row, name in enumerate(names):
        x, y = middle + row * across, top + row * down + 15
        lines.append(f'<path d="M{middle} {y}H{x}M{x} {y}V{bottom}"/>')
        places = (middle + column * across for column, other in enumerate(names[:row]) if used[name, other])
        marks += [f'<circle cx="{place}" cy="{y}" r="6" fill="#2f6fb0"/>' for place in places]
        marks += [
            f'<rect x="{x - box // 2}" y="{y - 15}" width="{box}" height="30" rx="5" fill="#2f4f75"/>',
            f'<text x="{x}" y="{y + 5}" fill="#fff" text-anchor="middle">{name}</text>',
            f'<text x="{x + box // 2 + 8}" y="{y + 5}" fill="#222">{HOLDS.get(name, shared)}</text>',
        ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 {bottom + 16}" font-family="sans-serif" '
            'font-size="13">',
            '<rect width="100%" height="100%" fill="#fff"/>',
            '<g stroke="#d9dde2" fill="none">',
            *lines,
            "</g>",
            *marks,
            "</svg>\n",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", type=Path, metavar="SVG", help="write the picture to this file")
    chosen = parser.parse_args()
    print(table())
    for line in against_order(imports()):
        print(f"against the order: {line}")
    if found := circle(imports()):
        print("circle:", " imports ".join(reversed(found)))
    if chosen.write:
        chosen.write.write_text(picture(), encoding="utf-8")


if __name__ == "__main__":
    main()
