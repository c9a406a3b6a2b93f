"""Print what the project requires, one a line: `requirements.py [EXTRA]`, next to pyproject.toml.

So that an image's slow layers, the dependencies, are built without the source and kept when only that changes.
"""

import re
import sys
import tomllib
from pathlib import Path


def requirements(pyproject: str, extra: str = "") -> list[str]:
    """The dependencies, or those of an extra; extras that name the project itself are followed."""
    project = tomllib.loads(pyproject)["project"]
    if not extra:
        return list(project["dependencies"])
    found: list[str] = []
    for requirement in project["optional-dependencies"][extra]:
        own = re.fullmatch(re.escape(project["name"]) + r"\[([\w,-]+)\]", requirement)
        if own is None:
            found.append(requirement)
            continue
        for name in own[1].split(","):
            found += requirements(pyproject, name)
    return found


if __name__ == "__main__":
    print("\n".join(requirements(Path("pyproject.toml").read_text(encoding="utf-8"), *sys.argv[1:])))
