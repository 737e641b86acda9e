"""Inputs and outputs of ComfyUI's built-in image classes, as of the pinned release.

Users' graphs are checked against them. ComfyUI itself ignores inputs that a class does not have,
yet runs the nodes linked to them. Inputs of other classes that the operator allows are not known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

IMAGE, MASK, MODEL = "IMAGE", "MASK", "UPSCALE_MODEL"  # types that only a link can supply
INT, FLOAT, BOOLEAN, STRING = "INT", "FLOAT", "BOOLEAN", "STRING"
COMBO = "COMBO"  # one of several texts
ANY = "*"


@dataclass(frozen=True, slots=True)
class NodeClass:
    """Types of the inputs by name, required and optional, and types of the outputs in order."""

    inputs: Mapping[str, str]
    outputs: tuple[str, ...]


NODE_CLASSES: Mapping[str, NodeClass] = {
    "AdjustBrightness": NodeClass({"images": IMAGE, "factor": FLOAT}, (IMAGE,)),
    "AdjustContrast": NodeClass({"images": IMAGE, "factor": FLOAT}, (IMAGE,)),
    "Canny": NodeClass({"image": IMAGE, "low_threshold": FLOAT, "high_threshold": FLOAT}, (IMAGE,)),
    "CenterCropImages": NodeClass({"images": IMAGE, "width": INT, "height": INT}, (IMAGE,)),
    "CropMask": NodeClass({"mask": MASK, "x": INT, "y": INT, "width": INT, "height": INT}, (MASK,)),
    "EmptyImage": NodeClass(
        {"width": INT, "height": INT, "batch_size": INT, "color": INT}, (IMAGE,)
    ),
    "FeatherMask": NodeClass(
        {"mask": MASK, "left": INT, "top": INT, "right": INT, "bottom": INT}, (MASK,)
    ),
    "FluxKontextImageScale": NodeClass({"image": IMAGE}, (IMAGE,)),
    "GetImageSize": NodeClass(
        {"image": IMAGE},
        (INT, INT, INT),
    ),
    "GrowMask": NodeClass({"mask": MASK, "expand": INT, "tapered_corners": BOOLEAN}, (MASK,)),
    "ImageAddNoise": NodeClass({"image": IMAGE, "seed": INT, "strength": FLOAT}, (IMAGE,)),
    "ImageBatch": NodeClass({"image1": IMAGE, "image2": IMAGE}, (IMAGE,)),
    "ImageBlend": NodeClass(
        {"image1": IMAGE, "image2": IMAGE, "blend_factor": FLOAT, "blend_mode": COMBO}, (IMAGE,)
    ),
    "ImageBlur": NodeClass({"image": IMAGE, "blur_radius": INT, "sigma": FLOAT}, (IMAGE,)),
    "ImageColorToMask": NodeClass({"image": IMAGE, "color": INT}, (MASK,)),
    "ImageCompositeMasked": NodeClass(
        {
            "destination": IMAGE,
            "source": IMAGE,
            "x": INT,
            "y": INT,
            "resize_source": BOOLEAN,
            "mask": MASK,
        },
        (IMAGE,),
    ),
    "ImageCrop": NodeClass(
        {"image": IMAGE, "width": INT, "height": INT, "x": INT, "y": INT}, (IMAGE,)
    ),
    "ImageFlip": NodeClass({"image": IMAGE, "flip_method": COMBO}, (IMAGE,)),
    "ImageFromBatch": NodeClass({"image": IMAGE, "batch_index": INT, "length": INT}, (IMAGE,)),
    "ImageInvert": NodeClass({"image": IMAGE}, (IMAGE,)),
    "ImagePadForOutpaint": NodeClass(
        {"image": IMAGE, "left": INT, "top": INT, "right": INT, "bottom": INT, "feathering": INT},
        (IMAGE, MASK),
    ),
    "ImageQuantize": NodeClass({"image": IMAGE, "colors": INT, "dither": COMBO}, (IMAGE,)),
    "ImageRGBToYUV": NodeClass(
        {"image": IMAGE},
        (IMAGE, IMAGE, IMAGE),
    ),
    "ImageRotate": NodeClass({"image": IMAGE, "rotation": COMBO}, (IMAGE,)),
    "ImageScale": NodeClass(
        {"image": IMAGE, "upscale_method": COMBO, "width": INT, "height": INT, "crop": COMBO},
        (IMAGE,),
    ),
    "ImageScaleBy": NodeClass(
        {"image": IMAGE, "upscale_method": COMBO, "scale_by": FLOAT}, (IMAGE,)
    ),
    "ImageScaleToMaxDimension": NodeClass(
        {"image": IMAGE, "upscale_method": COMBO, "largest_size": INT}, (IMAGE,)
    ),
    "ImageScaleToTotalPixels": NodeClass(
        {"image": IMAGE, "upscale_method": COMBO, "megapixels": FLOAT}, (IMAGE,)
    ),
    "ImageSharpen": NodeClass(
        {"image": IMAGE, "sharpen_radius": INT, "sigma": FLOAT, "alpha": FLOAT}, (IMAGE,)
    ),
    "ImageStitch": NodeClass(
        {
            "image1": IMAGE,
            "direction": COMBO,
            "match_image_size": BOOLEAN,
            "spacing_width": INT,
            "spacing_color": COMBO,
            "image2": IMAGE,
        },
        (IMAGE,),
    ),
    "ImageToMask": NodeClass({"image": IMAGE, "channel": COMBO}, (MASK,)),
    "ImageUpscaleWithModel": NodeClass({"upscale_model": MODEL, "image": IMAGE}, (IMAGE,)),
    "ImageYUVToRGB": NodeClass({"Y": IMAGE, "U": IMAGE, "V": IMAGE}, (IMAGE,)),
    "InvertMask": NodeClass({"mask": MASK}, (MASK,)),
    "JoinImageWithAlpha": NodeClass({"image": IMAGE, "alpha": MASK}, (IMAGE,)),
    "LoadImage": NodeClass(
        {"image": COMBO},
        (IMAGE, MASK),
    ),
    "LoadImageMask": NodeClass({"image": COMBO, "channel": COMBO}, (MASK,)),
    "LoadImageOutput": NodeClass(
        {"image": COMBO},
        (IMAGE, MASK),
    ),
    "MaskComposite": NodeClass(
        {"destination": MASK, "source": MASK, "x": INT, "y": INT, "operation": COMBO}, (MASK,)
    ),
    "MaskPreview": NodeClass({"mask": MASK}, ()),
    "MaskToImage": NodeClass({"mask": MASK}, (IMAGE,)),
    "Morphology": NodeClass({"image": IMAGE, "operation": COMBO, "kernel_size": INT}, (IMAGE,)),
    "NormalizeImages": NodeClass({"images": IMAGE, "mean": FLOAT, "std": FLOAT}, (IMAGE,)),
    "PorterDuffImageComposite": NodeClass(
        {
            "source": IMAGE,
            "source_alpha": MASK,
            "destination": IMAGE,
            "destination_alpha": MASK,
            "mode": COMBO,
        },
        (IMAGE, MASK),
    ),
    "PreviewAny": NodeClass({"source": ANY}, ()),
    "PreviewImage": NodeClass({"images": IMAGE}, ()),
    "RandomCropImages": NodeClass(
        {"images": IMAGE, "width": INT, "height": INT, "seed": INT}, (IMAGE,)
    ),
    "RepeatImageBatch": NodeClass({"image": IMAGE, "amount": INT}, (IMAGE,)),
    "ResizeAndPadImage": NodeClass(
        {
            "image": IMAGE,
            "target_width": INT,
            "target_height": INT,
            "padding_color": COMBO,
            "interpolation": COMBO,
        },
        (IMAGE,),
    ),
    "ResizeImagesByLongerEdge": NodeClass({"images": IMAGE, "longer_edge": INT}, (IMAGE,)),
    "ResizeImagesByShorterEdge": NodeClass({"images": IMAGE, "shorter_edge": INT}, (IMAGE,)),
    "SaveImage": NodeClass({"images": IMAGE, "filename_prefix": STRING}, ()),
    "SolidMask": NodeClass({"value": FLOAT, "width": INT, "height": INT}, (MASK,)),
    "SplitImageWithAlpha": NodeClass(
        {"image": IMAGE},
        (IMAGE, MASK),
    ),
    "ThresholdMask": NodeClass({"mask": MASK, "value": FLOAT}, (MASK,)),
    "UpscaleModelLoader": NodeClass({"model_name": COMBO}, (MODEL,)),
}
