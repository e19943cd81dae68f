"""Training of the embedded model: `python -m sflow_jax.toyworld.train --out FOLDER` does everything.

Stages, each in its own folder, each resumed from its newest checkpoint by the same command:

    vae      the autoencoder
    decoder  its decoder alone, polished on the latents that the transformer learns
    clip     pictures and captions in one space; the text half is the transformer's pooled vector
    t5       reads captions; frozen from then on, as FLUX's
    dino     reads every attribute of a scene: the measuring stick
    flow     the transformer by flow matching, captions dropped now and then
    distill  a student with the guidance scale as an input, as FLUX.1-dev
    export   the diffusers folder, half precision

The embedded SD3 learns from the encoders and the autoencoder that ship (`--stage sd3`, then `--stage export-sd3`):

    sd3         its transformer by flow matching, captions dropped now and then, from the embedded FLUX's layers
    export-sd3  what of it is its own

`plan.py` holds sizes and recipes, `loop.py` the loop that all stages share.
"""
