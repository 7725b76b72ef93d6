"""The models: encoder, diffusion decoder, caption decoder, and the pipeline that joins them."""
