from bitnet_triton.kernels.quantize.op import quantize_activations, quantize_weight

__all__ = ["quantize_activations", "quantize_weight"]
