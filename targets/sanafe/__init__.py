"""SANA-FE's Loihi as a target: spikes identical to the reference, and the energy and time that the simulated chip charges for them."""
