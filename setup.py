"""What pyproject.toml cannot say of the wheel.

The root is both the package and a ComfyUI node pack: the nodes are left out, as ComfyUI finds them in a clone alone.
The repository has no public address yet, so on a package index the README's links to files and pictures are plain text.
"""

import re
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

NOT_FOR_THE_WHEEL = {"comfy_nodes", "setup"}
README = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")


class WithoutNodes(build_py):  # type: ignore[misc]  # setuptools has no types
    """Packages the root but for the nodes."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        found: list[tuple[str, str, str]] = super().find_package_modules(package, package_dir)
        return [module for module in found if module[1] not in NOT_FOR_THE_WHEEL]


setup(
    cmdclass={"build_py": WithoutNodes},
    long_description=re.sub(r"!?\[([^\]]*)\]\((?!https?:)[^)]*\)", r"\1", README),
    long_description_content_type="text/markdown",
)
