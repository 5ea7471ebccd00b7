"""larq-compute-engine's binary layer, a peer of one-bit layers where it is installed (it needs TensorFlow)."""

# M rows, K inputs, N outputs

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata


def version() -> str | None:
    """The installed version; None without it."""
    try:
        return metadata.version("larq-compute-engine")
    except metadata.PackageNotFoundError:
        return None


def layer(rows: int, inputs: int, outputs: int) -> dict[str, Callable[[], object]]:
    """Its binary convolution with a kernel of one frame, M x K signs times K x N: a linear layer. Empty where it is not installed."""
    if version() is None:
        return {}
    import larq
    import larq_compute_engine as engine
    import numpy
    import tensorflow as tf
    from larq_compute_engine.tflite.python.interpreter import Interpreter

    sign = {"input_quantizer": "ste_sign", "kernel_quantizer": "ste_sign", "kernel_constraint": "weight_clip"}
    model = tf.keras.Sequential([
        tf.keras.layers.InputLayer((rows, 1, inputs)),
        larq.layers.QuantConv2D(outputs, 1, use_bias=True, **sign),
    ])  # fmt: skip
    interpreter = Interpreter(engine.convert_keras_model(model), num_threads=1)
    x = numpy.random.default_rng(0).standard_normal((1, rows, 1, inputs)).astype("float32")
    return {"larq-compute-engine": lambda: interpreter.predict(x)}
