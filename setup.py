"""The packages of the wheel: those of dream_lightning, and the folder configs as dream_lightning.configs."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["dream_lightning*"]), "dream_lightning.configs"],
    package_dir={"dream_lightning.configs": "configs"},
)
