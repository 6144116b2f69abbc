"""Model types that `test_every_model_type` can't take through the whole cycle, by reason.

None of them fails because of rankwise. Types in `NOT_MADE` raise an error in Transformers' own constructor, given their
own default configuration with few layers. For many types that default does not describe a real model.
"""

from __future__ import annotations

NO_CLASS = "has no class of its own: it is a part of another model's configuration"
NOTHING = "has no linear layers"
TOO_LARGE = "is too large at its smallest: it has widths that its configuration does not tell"
NEEDS = "needs a package that is not installed"
NOT_MADE = "is not made by Transformers from its own default configuration with few layers"

# The packages that the types under `NEEDS` require.
PACKAGES = ("detectron2", "natten", "timm", "torchaudio")

# The number of types that real PEFT 0.21.2 takes through the same cycle, with `cycle.Peft` and Transformers 5.23.
OF_PEFT = 629

REASONS: dict[str, frozenset[str]] = {
    NO_CLASS: frozenset(
        """
        blip_text_model edgetam_mask_decoder edgetam_prompt_encoder edgetam_video_mask_decoder
        edgetam_video_prompt_encoder gemma4_unified_audio gemma4_unified_vision idefics_perciever idefics_vision
        layoutxlm nougat pp_chart2table_vision sam2_mask_decoder sam2_prompt_encoder sam2_video_mask_decoder
        sam2_video_prompt_encoder sam3_geometry_encoder sam3_lite_text_geometry_encoder
        sam3_tracker_mask_decoder sam3_tracker_prompt_encoder sam3_tracker_video_mask_decoder
        sam3_tracker_video_prompt_encoder sam_hq_mask_decoder sam_hq_prompt_encoder sam_mask_decoder
        sam_prompt_encoder sapiens2_head t5_gemma_module vibevoice_diffusion
        """.split()
    ),
    NOTHING: frozenset(
        """
        chameleon_vqgan dac encodec fastspeech2_conformer_hifigan flava_image_codebook glm_image_vqmodel
        inkling_audio mobilenet_v2 mobilevitv2 moshi_depth pp_lcnet_v3 pp_lcnet_v4 pp_ocrv5_mobile_det
        pp_ocrv5_mobile_rec pp_ocrv5_server_rec pp_ocrv6_small_det pp_ocrv6_small_rec pp_ocrv6_tiny_rec
        rt_detr_resnet speecht5_hifigan superpoint univnet upernet uvdoc uvdoc_backbone
        """.split()
    ),
    TOO_LARGE: frozenset(
        """
        align align_vision_model blt cohere2_moe csm efficientnet emu3_vqgan ernie4_5_vl_moe
        ernie4_5_vl_moe_text flaubert gemma4 gemma4_text janus janus_vqgan kyutai_speech_to_text longcat_flash
        mimi perceiver pix2struct_text_model qwen2_5_omni qwen2_5_omni_bigvgan qwen2_5_omni_token2wav vibevoice
        vibevoice_acoustic_tokenizer vibevoice_acoustic_tokenizer_decoder vibevoice_acoustic_tokenizer_encoder
        vibevoice_asr xlm
        """.split()
    ),
    NEEDS: frozenset(
        """
        conditional_detr dab-detr deformable_detr detr dinat edgetam edgetam_vision_model fast_vlm gemma3n
        gemma3n_vision higgs_audio_v2_tokenizer layoutlmv2 omdet-turbo pe_audio_video pe_audio_video_encoder
        pe_video pe_video_encoder perception_lm table-transformer timm_backbone timm_wrapper
        """.split()
    ),
    NOT_MADE: frozenset(
        """
        aya_vision chameleon cohere_compass cohere_compass_text cvt dbrx deepseek_ocr2 deepseek_ocr2_text
        diffusion_gemma diffusion_gemma_text dots1 emu3 gemma3n_text gemma4_assistant gemma4_unified_assistant
        granite4_vision lfm2_moe moonshine_streaming musicgen musicgen_melody pp_ocrv5_server_det
        pp_ocrv6_medium_det qwen3_omni_moe qwen3_omni_moe_talker_text t5gemma2_decoder t5gemma2_encoder
        t5gemma2_text vitmatte
        """.split()
    ),
}
