"""The compact model: tables as a size plan wants them, on plain collections that TorchRec shards."""
