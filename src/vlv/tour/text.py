"""The words of the tour; `page.py` fills in what was measured."""

from string import Template

TOUR = Template("""\
<!-- Written by `vlv tour`. Do not edit: change src/vlv/tour and run the command again. -->

# Tour: one image through every tensor

Here one image goes through a whole model, and every tensor on the way is shown with its shape, its type, and the mean and
standard deviation of its numbers. The page is written by `vlv tour`, which runs the model `$model`; sections and
equations are those of the [paper](https://arxiv.org/abs/2507.07104).

```
 file ── 1 ──▶ pixels ── 2, 3, 4, 5 ──▶ z ── 6 ──▶ c ──┬── 7 ──▶ e ──▶ tokens ──▶ caption
                        VLVEncoder           text      │         CaptionDecoder
                                             tower T   └── 8, 9 ──▶ latents ──▶ image
                                                                 DiffusionDecoder, frozen
```

| letter | meaning | here |
|---|---|---|
$letters

## 1. A file becomes pixels

![The image]($pictures/image.png)

`load_image` opens a file upright and in RGB, whatever it was; the centre square is cut out of it and resized to the
$side pixels of this model. From here on pixels are float32 in [0, 1]; each part resizes and normalises for itself.

$t_pixels

The image is a scene of the [toy world](toyworld.md) that no training has seen, so the truth about it is known:

> $truth

## 2. The vision tower looks at them

Florence-2's vision tower (DaViT) turns pixels into a feature map (paper, section 3.1). A linear layer and a norm bring each
of its places to the width d of the language model; token 0 is the mean of all places. The authors freeze this part in
stage 1.

$t_features

![Image tokens]($pictures/features.png)

*The image tokens at their places; their three principal components as red, green and blue.*

## 3. The language encoder reads image and prompt

The N image tokens are followed by the P tokens of a fixed prompt, and Florence-2's language encoder reads them all
together (paper, section 3.1).

$t_memory

## 4. Learned queries ask the questions

Florence-2's language decoder would now write a caption word by word. Instead it is fed Q learned vectors, the *queries*, in
place of word embeddings. Each sees the queries before it and all encoder states (paper, section 3.1). The queries are the
same for every image; the decoder states are not.

$t_hidden

## 5. The caption embedding z

The projector φ, two linear layers with a GELU between them, takes the decoder states to the width D of the text tower's
word embeddings. The result is the **caption embedding z**: what `vlv embed` saves and `vlv mix` mixes, and all that both
decoders get to know of the image.

$t_z

![z]($pictures/z.png)

*z: one row for each of the Q tokens, one column for each of the D numbers; blue is below zero, red above.*

## 6. The text tower makes it context

The frozen text tower T of the diffusion model reads z as if it were the embeddings of Q words: it adds its positions, lets
every token see those before it, and ends with a norm. The result is the **context c**, and both decoders start from it.

$t_c

![c]($pictures/c.png)

*c, drawn as z.*

## 7. c in words

In stage 2 a second small network ψ learns to take c to the width E of a language model: the **prefix e** stands before the
caption where a prompt would stand, and the model continues it until it says that it is done (paper, section 3.3).

$t_caption

![e]($pictures/e.png)

*e, drawn as z.*

The caption, greedy$finished:

> $caption

Token by token:

$pieces

The loss of stage 2 (equation 2) is the cross-entropy of a caption given e. For the model's own caption it is
$own_loss nats per token, for the true caption above, one of many true ones, $true_loss.

## 8. What c is worth to the diffusion decoder

In stage 1 no words occur at all. The VAE turns the image into latents, noise is added to them, and the frozen U-Net has to
say what the noise hides, given c. How well it does is the loss (equation 1); its gradient goes through the U-Net and the
text tower, which do not change, to z and into the encoder.

$t_latents

Mean loss of this image over the same $num_draws draws of timestep and noise:

| the U-Net is given | loss |
|---|---:|
$losses

## 9. From noise to an image

To rebuild the image, the sampler starts from pure noise of the seed $seed and lets the U-Net improve it in $steps steps,
each of which follows c by a guidance of $guidance. The VAE decodes what is left.

$t_sampling

![Sampling]($pictures/sampling.png)

*Above the latents, the first three channels as red, green and blue; below what the VAE makes of them. Timesteps
$timesteps.*

![The image, the VAE's copy, and the image from z]($pictures/result.png)

*The image; its own latents decoded, which is the best that any drawing can be; and what was drawn from z.*

## Where it is in the code

| what | where |
|---|---|
| files to pixels | `vlv.data.images`, `vlv.models.pixels` |
| pixels to z | `vlv.models.encoder.VLVEncoder` |
| z to c | `vlv.models.text_tower.contextualize` |
| c to a caption | `vlv.models.captioner.CaptionDecoder` |
| c to an image, and the loss of stage 1 | `vlv.models.diffusion.DiffusionDecoder` |
| what trains, and which loss | `vlv.training.stages` |
| all of it in one object | `vlv.models.pipeline.VLVPipeline` |
""")
