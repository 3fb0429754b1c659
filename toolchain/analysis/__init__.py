"""What can be said of a compiled network before it runs: what real inputs reach, how far integers can go, whether loops settle, where rounding costs."""

from toolchain.analysis.calibration import calibrate, training_samples

__all__ = ["calibrate", "training_samples"]
