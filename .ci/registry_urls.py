"""Put a repository's address into pyproject.toml: python3 .ci/registry_urls.py https://github.com/OWNER/NAME COMMIT.

ComfyUI's registry and Manager link the repository and show an icon by its URL. Nobody knows the address before the
repository is published somewhere, so the publishing workflow writes it.
"""

import re
import sys
from pathlib import Path

PROJECT = Path(__file__).parents[1] / "pyproject.toml"


def with_urls(project: str, repository: str, commit: str) -> str:
    """The text of pyproject.toml with the repository's urls and the icon's."""
    owner_and_name = repository.rstrip("/").split("/", 3)[3]
    icon = f"https://raw.githubusercontent.com/{owner_and_name}/{commit}/docs/icon.png"
    page = f"{repository}/blob/{commit}/docs/comfyui.md"
    urls = f'[project.urls]\nRepository = "{repository}"\nDocumentation = "{page}"\n'
    project, icons = re.subn(r'^Icon = ""', f'Icon = "{icon}"', project, flags=re.MULTILINE)
    project, tables = re.subn(r"^(?=\[tool\.comfy\]$)", f"{urls}\n", project, flags=re.MULTILINE)
    if (icons, tables) != (1, 1) or "[project.urls]" in project.split(urls)[0]:
        raise SystemExit("pyproject.toml has no empty Icon, no [tool.comfy] or urls already: look at it")
    return project


if __name__ == "__main__":
    PROJECT.write_text(with_urls(PROJECT.read_text(encoding="utf-8"), *sys.argv[1:3]), encoding="utf-8")
