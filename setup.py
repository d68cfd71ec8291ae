"""What pyproject.toml cannot say: the recipes of configs/ are installed inside the package, as jaxdistill/configs/."""

from setuptools import find_namespace_packages, find_packages, setup

FOLDERS = find_namespace_packages("configs", exclude=["*__pycache__*"])
RECIPES = ["jaxdistill.configs", *(f"jaxdistill.configs.{name}" for name in FOLDERS)]

setup(
    packages=[*find_packages(include=["jaxdistill*"]), *RECIPES],
    package_dir={"jaxdistill.configs": "configs"},
    package_data={"jaxdistill": ["py.typed", "report/*.css"], **{name: ["*"] for name in RECIPES}},
    exclude_package_data={"": ["*.pyc"]},
)
