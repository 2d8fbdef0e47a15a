"""A complete command for each verb that needs labelled images: for the help, and for messages about missing values."""

EXAMPLES = {
    "evaluate": "gtsa evaluate runs/first --task segmentation --train images/ masks/ --folds 5",
    "compare": "gtsa compare --data photos/ --out runs/compare --task segmentation --train images/ masks/ --folds 5",
}
