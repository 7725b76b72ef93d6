"""From a run configuration to a trained model folder: loads the parts, joins them with the loop, saves.

A stage is (objective, evaluation, samples); everything around it is the same for all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    Florence2ForConditionalGeneration,
    PreTrainedTokenizerBase,
)

from vlv.config import (
    BackboneEncoder,
    FlorenceEncoder,
    PartSource,
    RunConfig,
    Stage1Run,
    Stage2Run,
    Stage3Run,
    TrainedEncoder,
)
from vlv.data.loader import Listed, Loader, LoaderSettings, Streamed, epoch_batches
from vlv.data.records import Record
from vlv.data.source import find_records
from vlv.engine import EngineSettings
from vlv.errors import ConfigError, ModelFolderError
from vlv.models.adapter import language_models
from vlv.models.bottleneck import DEFAULT_TEMPERATURE, BottleneckSettings
from vlv.models.captioner import CaptionDecoder
from vlv.models.diffusion import DiffusionDecoder
from vlv.models.draws import RowGenerator
from vlv.models.encoder import DEFAULT_PROMPT, VLVEncoder
from vlv.models.gguf_files import unpacked
from vlv.models.lora import add_low_rank
from vlv.models.vision_encoder import VisionEncoder, VisionEncoderConfig, read_image_statistics
from vlv.training.caption_meter import CaptionMeter
from vlv.training.distributed import World, join_world
from vlv.training.engine import captions_by, check_engine
from vlv.training.export import Results, make_pipeline, save_result
from vlv.training.feeding import columns_of, find_data, make_loader
from vlv.training.held_out import DenoisingMeter, HeldOutLoss, Samples
from vlv.training.loop import fit
from vlv.training.objective import Batch, Evaluate, FitResult, Objective, Sample
from vlv.training.parallel import check_sharding
from vlv.training.parts import (
    encoder_folder,
    framing_of,
    load_component,
    load_decoder,
    load_pretrained,
    part_folder,
)
from vlv.training.precision import fast_products, pack_frozen, store_frozen, warn_of_slow_products
from vlv.training.provenance import provenance
from vlv.training.recompute import choose_recomputation
from vlv.training.stage3 import Stage, Stage3
from vlv.training.stages import Stage1, Stage2

_HELD_OUT_IMAGES = 256


@dataclass(frozen=True)
class Parts:
    """What a stage works on; `caption_decoder` is None in stage 1."""

    encoder: VLVEncoder | VisionEncoder
    decoder: DiffusionDecoder
    caption_decoder: CaptionDecoder | None = None

    def to(self, device: torch.device) -> None:
        """Move everything to a device."""
        for module in (self.encoder, self.decoder, self.caption_decoder):
            if module is not None:
                nn.Module.to(module, device)


def train(
    config: RunConfig,
    run_dir: Path,
    *,
    export: Path | None = None,
    max_seconds: float | None = None,
    engine: EngineSettings | None = None,
) -> FitResult:
    """Train one stage and save the model; the same call goes on after an interruption.

    Args:
        config: The run.
        run_dir: Its folder.
        export: Where the whole model goes; `run_dir/model` by default, and nowhere where adapters train, see `Results`.
        max_seconds: Stop and save after this time.
        engine: That writes the captions of stage 3, where `stage3.engine` names one.

    Raises:
        ModelFolderError: A part cannot be found or loaded.
        DataError: The images, or for stage 2 their captions, are missing.
        Interrupted: As `fit`; no model is saved then.
    """
    world = join_world()
    check_sharding(config, world)
    check_engine(config, engine, world)
    with world.together():
        found = find_data(config.data)
        held_out = find_held_out(config)
        parts = load_parts(config)
        objective = prepare(config, parts, world.device)
    choose_recomputation(objective, config.data.image_size, config.loop, config.optim, world)
    with (
        fast_products(tf32=config.loop.tf32),
        captions_by(config, parts.caption_decoder, engine),
        world.main_first(lambda: feed(config, parts, found, run_dir, world)) as loader,
    ):
        result = fit(
            objective,
            loader,
            config.loop,
            config.optim,
            run_dir,
            evaluate=make_evaluation(config, parts, objective, held_out),
            sample=make_samples(config, parts, held_out),
            max_seconds=max_seconds,
            settings=config.model_dump(mode="json", exclude={"loop", "optim"}),
        )
    known = provenance(
        config,
        run_dir,
        num_images=len(found.records) if isinstance(found, Listed) else None,
        num_held_out=len(held_out),
        learnt_from=encoder_folder(config),
    )
    results = Results(run_dir, export)
    world.on_main(lambda: save_result(config, parts, lambda: load_parts(config), results, known))
    return result


def feed(
    config: RunConfig, parts: Parts, found: Listed | Streamed, run_dir: Path, world: World
) -> Loader:
    """The loader of this process."""
    return make_loader(
        config, parts, found, run_dir, world, framing_of(config), lambda: _own_tokenizer(config)
    )


def find_held_out(config: RunConfig) -> list[Record]:
    """The first images of those that are never trained on."""
    inputs = config.data.held_out
    if not inputs:
        return []
    return find_records(inputs, columns=columns_of(config.data))[:_HELD_OUT_IMAGES]


# --- parts -----------------------------------------------------------------------------------------


def load_parts(config: RunConfig) -> Parts:
    """What the run's stage works on."""
    return load_stage1(config) if isinstance(config, Stage1Run) else load_captioning(config)


def load_stage1(config: Stage1Run) -> Parts:
    """The encoder, fresh or one that learns on, and the frozen diffusion decoder."""
    decoder = load_decoder(config.model.decoder)
    return Parts(load_encoder(config, decoder), decoder)


def load_captioning(config: Stage2Run | Stage3Run) -> Parts:
    """The encoder, the caption decoder, and as much of the diffusion decoder as stages 2 and 3 need.

    The encoder is that of the stage before; where stage 2 names none, a fresh one (paper, Table 7).
    """
    draws = config.stage2 is None or bool(config.stage2.denoising_weight)
    decoder = load_decoder(config.model.decoder, draws=draws)
    return Parts(load_encoder(config, decoder), decoder, load_caption_decoder(config, decoder))


def load_encoder(config: RunConfig, decoder: DiffusionDecoder) -> VLVEncoder | VisionEncoder:
    """A trained encoder where the configuration names one, or else a fresh one."""
    model = config.model
    if not isinstance(model, TrainedEncoder):
        return _fresh_encoder(config, model, decoder)
    encoder: VLVEncoder | VisionEncoder = load_component(model.encoder, "encoder", ["embed"])
    _check_width(encoder, model.encoder, decoder)
    if encoder.bottleneck is not None:
        encoder.bottleneck.is_annealed = True
    return encoder


def load_caption_decoder(config: RunConfig, decoder: DiffusionDecoder) -> CaptionDecoder:
    """A trained caption decoder where the configuration names one, or else a language model with a fresh projector."""
    trained, source = config.model.caption_decoder, config.model.llm
    if trained is not None:
        caption_decoder: CaptionDecoder = load_component(trained, "caption_decoder", None)
        _check_width(caption_decoder, trained, decoder)
        return caption_decoder
    if source is None:
        raise ConfigError("stage2 needs model.llm or model.caption_decoder; set one of them")
    source = unpacked(source)
    return CaptionDecoder.from_llm(
        load_pretrained(AutoModelForCausalLM, source, "llm"),
        load_pretrained(AutoTokenizer, source, "tokenizer of the llm"),
        text_width=decoder.text_width,
        seed=config.loop.seed,
    )


def _fresh_encoder(
    config: RunConfig, model: FlorenceEncoder | BackboneEncoder, decoder: DiffusionDecoder
) -> VLVEncoder | VisionEncoder:
    """Florence-2 or a vision backbone with everything fresh that makes z of its tokens, and a bottleneck if asked for."""
    encoder: VLVEncoder | VisionEncoder
    if isinstance(model, BackboneEncoder):
        encoder = _backbone_encoder(config, model, decoder)
    else:
        encoder = _florence_encoder(config, model, decoder)
    kind = model.bottleneck
    if kind is not None and kind != "continuous":
        table = decoder.token_table()
        settings = BottleneckSettings(
            kind,
            num_codes=len(table),
            temperature=model.gumbel_temperature or DEFAULT_TEMPERATURE,
            temperature_steps=model.gumbel_steps or config.loop.steps,
        )
        encoder.discretize(table, settings)
    return encoder


def _florence_encoder(
    config: RunConfig, model: FlorenceEncoder, decoder: DiffusionDecoder
) -> VLVEncoder:
    """Florence-2 with fresh queries and projector for the text tower of a decoder."""
    return VLVEncoder.from_florence(
        load_pretrained(Florence2ForConditionalGeneration, model.florence, "florence"),
        _florence_tokenizer(model.florence),
        num_queries=model.num_queries or decoder.num_positions,
        text_width=decoder.text_width,
        image_size=model.input_size or config.data.image_size,
        seed=config.loop.seed,
        prompt=model.prompt or DEFAULT_PROMPT,
    )


def _florence_tokenizer(source: PartSource) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = load_pretrained(
        AutoTokenizer, source, "tokenizer of florence"
    )
    return tokenizer


def _own_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the Florence-2 that becomes the encoder, for its own captions."""
    if not isinstance(config.model, FlorenceEncoder):
        raise ConfigError("only a Florence-2 writes captions of its own; set model.florence")
    return _florence_tokenizer(config.model.florence)


def _backbone_encoder(
    config: RunConfig, model: BackboneEncoder, decoder: DiffusionDecoder
) -> VisionEncoder:
    """A vision backbone with fresh queries, transformer and projector for the text tower of a decoder."""
    backbone = load_pretrained(AutoModel, model.backbone, "backbone")
    size, mean, std = read_image_statistics(part_folder(model.backbone, None))
    return VisionEncoder.from_backbone(
        backbone,
        num_queries=model.num_queries or decoder.num_positions,
        text_width=decoder.text_width,
        image_size=model.input_size or size,
        image_mean=mean,
        image_std=std,
        seed=config.loop.seed,
        num_layers=model.backbone_layers or VisionEncoderConfig.num_layers,
    )


def _check_width(
    part: VLVEncoder | VisionEncoder | CaptionDecoder, source: PartSource, decoder: DiffusionDecoder
) -> None:
    width, wanted = part.config.text_width, decoder.text_width
    if width != wanted:
        raise ModelFolderError(
            f"{source.path} was trained for a text tower of width {width}, but that of the diffusion decoder has "
            f"{wanted}; name the decoder it was trained with"
        )


# --- what the loop is given ------------------------------------------------------------------------


def make_objective(config: RunConfig, parts: Parts) -> Stage:
    """What trains, and which loss; the parts get adapters where these train."""
    if config.stage1 is not None:
        return Stage1(parts.encoder, parts.decoder, config.stage1)
    if parts.caption_decoder is None:
        raise ConfigError(f"{config.stage} needs a caption decoder")
    stage = config.stage2 or config.stage3
    if stage is not None and stage.lora is not None:
        encoder = parts.encoder if stage.trainable == "mlp+llm+encoder" else None
        for model in language_models(encoder, parts.caption_decoder).values():
            add_low_rank(model, stage.lora, config.loop.seed)
    if config.stage3 is not None:
        return Stage3(parts.encoder, parts.decoder, parts.caption_decoder, config.stage3)
    return Stage2(parts.encoder, parts.decoder, parts.caption_decoder, config.stage2)


def prepare(config: RunConfig, parts: Parts, device: torch.device) -> Stage:
    """The objective on its device, as exact as the settings say; what is recomputed is still to be chosen."""
    if config.lora is not None and config.lora.bits and parts.caption_decoder is not None:
        pack_frozen(parts.caption_decoder, config.loop.precision)
    parts.to(device)
    objective = make_objective(config, parts)
    if config.loop.precision == "bf16":
        warn_of_slow_products(device)
    set_precision(config, parts, objective)
    return objective


def set_precision(config: RunConfig, parts: Parts, objective: Objective) -> None:
    """Hold what is frozen in bfloat16 where the arithmetic is; the weights that train stay in float32, and so does the VAE by default."""
    vae = parts.decoder.vae
    if config.loop.precision == "bf16":
        store_frozen(objective.module, torch.bfloat16, keep=[vae])
    if config.loop.vae_precision == "bf16" and vae is not None:
        store_frozen(vae, torch.bfloat16)


def make_evaluation(
    config: RunConfig, parts: Parts, objective: Objective, held_out: Sequence[Record]
) -> Evaluate | None:
    """Figures on held-out images: where z stands between no text and the true text, and the loss of captions."""
    if not held_out:
        return None
    batches = list(_held_out_batches(config, held_out, config.loop.batch_size))
    meters: list[Evaluate] = []
    captions = [caption for batch in batches for caption in batch["captions"]]
    z_changes = config.stage3 is None or config.stage3.trainable == "mlp+llm+encoder"
    if parts.decoder.denoiser is not None and all(captions) and z_changes:
        pixels = torch.cat([batch["pixels"] for batch in batches])
        meters.append(DenoisingMeter(parts.encoder, parts.decoder, pixels, captions))
    if isinstance(objective, Stage2):
        meters.append(HeldOutLoss(objective, list(_with_texts(objective, batches))))
    if isinstance(objective, Stage3):
        meters.append(CaptionMeter(objective, batches))
    return lambda step: {k: v for meter in meters for k, v in meter(step).items()}


def _with_texts(objective: Stage2, batches: Sequence[Batch]) -> Iterator[Batch]:
    """Held-out batches with their texts, the same at every look."""
    start = 0
    for batch in batches:
        rows = range(start, start + len(batch["ids"]))
        yield objective.prepare(batch, RowGenerator(0, 0, rows))
        start = rows.stop


def _held_out_batches(
    config: RunConfig, records: Sequence[Record], batch_size: int
) -> Iterator[Batch]:
    settings = LoaderSettings(
        batch_size=batch_size,
        image_size=config.data.image_size,
        num_workers=config.data.num_workers,
        framing=framing_of(config),
    )
    return epoch_batches(list(records), settings)


def make_samples(config: RunConfig, parts: Parts, held_out: Sequence[Record]) -> Sample | None:
    """Pictures of a few held-out images, and captions of them."""
    if not held_out:
        return None

    def load(records: Sequence[Record]) -> Batch:
        (batch,) = _held_out_batches(config, records, len(records))
        return batch

    return Samples(make_pipeline(config, parts), held_out, load)
