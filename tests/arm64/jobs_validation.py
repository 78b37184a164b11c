"""What test_validation.py sends to the emulated side."""


def validate(bundle, inputs, gates=()):
    """`armopt.validate` where the bundle is to run, against the reference that it keeps."""
    import armopt

    return armopt.validate(bundle, inputs=inputs, gates=gates)


def log_of_one_call(bundle, inputs):
    """oneDNN's log of a call, and the kernel of every node."""
    import warnings

    import armopt
    from armopt.runtime import onednn_log

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = armopt.load(bundle)
    model(**inputs)
    with onednn_log.capture_verbose() as log:
        model(**inputs)
    return log.text, [(bound.node, bound.kernel, bound.reason) for bound in model.kernels[0]]
