import pathlib
import re

from setuptools import find_packages, setup

root = pathlib.Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (root / "seal_jax" / "__init__.py").read_text()).group(1)

setup(
    name="seal_jax",
    version=version,
    description="SEAL, self-adapting language models, in JAX: fit and measure many self-edits in one program",
    long_description=(root / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["seal_jax", "seal_jax.*"]),
    package_data={"seal_jax": ["tasks/knowledge/data/*.json", "runs/*.j2"]},
    install_requires=[
        "jax>=0.8,<0.13",
        "flax>=0.10,<0.14",
        "optax>=0.2.4,<0.3",
        "orbax-checkpoint>=0.11,<0.14",
        "numpy>=1.26",
        "transformers>=4.51,<6",
        "tokenizers>=0.20",
        "safetensors>=0.4",
        "huggingface_hub>=0.30",
        "gguf>=0.10,<1",
        "datasets>=3,<6",
        "tensorflow-datasets>=4.9.7,<5",
        "openai>=1.50,<4",
        "diskcache>=5.6,<6",
        "rapidfuzz>=3.9,<4",
        "omegaconf>=2.3,<3",
        "PyYAML>=6",
        "jinja2>=3.1,<4",
        "matplotlib>=3.8,<4",
        "tqdm>=4.66",
        "requests>=2.31",
    ],
    extras_require={
        "cuda": ["jax[cuda13]>=0.8,<0.13"],
        "tpu": ["jax[tpu]>=0.8,<0.13"],
        "test": ["pytest>=8", "hypothesis>=6.100", "torch==2.13.0", "peft>=0.15,<0.22"],
        "dev": ["ruff>=0.8"],
    },
    entry_points={"console_scripts": ["seal-jax = seal_jax.cli:main"]},
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
