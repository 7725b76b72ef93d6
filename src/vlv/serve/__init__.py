"""A model as a service: OpenAI's chat form and the other abilities of `VLVPipeline` over HTTP."""
