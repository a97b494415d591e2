"""Packaging: the library is wandapp_kernels/; kernels/ is installed as wandapp_kernels.kernels."""

from setuptools import find_packages, setup

LIBRARY = find_packages(include=["wandapp_kernels", "wandapp_kernels.*"])

setup(
    packages=[*LIBRARY, "wandapp_kernels.kernels"],
    package_dir={"wandapp_kernels": "wandapp_kernels", "wandapp_kernels.kernels": "kernels"},
    package_data={"wandapp_kernels": ["py.typed"]},
)
