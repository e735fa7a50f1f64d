"""The model that users hold: an encoder, its labels, their index, a memory and a calibration."""
