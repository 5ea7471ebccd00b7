"""From folders of audio to manifests: listing, checking, conversion, imports from lhotse and Kaldi, synthetic corpora."""
