"""lmms-eval's door to voco_jax: `python -m lmms_eval --model voco_jax --model_args run=DIR,tokens=1 --tasks …`.

lmms-eval finds `manifest` by the entry point in setup.py; the adapter itself is in `model.py`.
"""


def manifest():
    """What lmms-eval registers. Cheap: it is called for every lmms-eval command, whatever model that is about."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("voco_jax", simple_class_path="voco_jax.eval.lmms.model.VoCoJax")
