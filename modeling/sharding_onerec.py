"""What a OneRec generator adds to transformers' sharding (`DistributedConfig`): a check of its tied tables, and each table saved once."""


class ShardedModel:
    """Mixed into a `PreTrainedModel` with tied embeddings."""

    @classmethod
    def maybe_distribute_model(cls, model, distributed_config, mesh_manager):
        """
        Raises:
            ValueError: tied tables whose rows do not divide by the shards: torch would go on and train them wrong from the second step
                on, without a message (seen with torch 2.13, also in models of transformers). A loss on item vectors: it reads them outside
                of the encoder, where shards are not gathered.
        """
        sharded = mesh_manager is not None
        if sharded and model.config.item_loss_weight:
            raise ValueError(
                f"a model with item_loss_weight={model.config.item_loss_weight} cannot be sharded: train it in one process or under DDP"
            )
        if sharded and model.config.tie_word_embeddings:
            rows, shards = model.config.vocab_size, distributed_config.fsdp_size
            if rows % shards:
                enough = -(-rows // shards) * shards
                raise ValueError(
                    f"the tied embedding has vocab_size={rows} rows, which fsdp_size={shards} does not divide: torch trains such a table "
                    f"wrong without a message. Make the model with vocab_size={enough}, or load it in one process, call "
                    f"model.resize_token_embeddings({enough}) and save it"
                )
        return super().maybe_distribute_model(model, distributed_config, mesh_manager)

    def gather_sharded_state_dict_for_save(self, model_to_save, state_dict, distributed_config, **kwargs):
        """The weights as they are saved; a tied table once, as a model that is not sharded saves it."""
        gathered = super().gather_sharded_state_dict_for_save(model_to_save, state_dict, distributed_config, **kwargs)
        return {name: value for name, value in gathered.items() if name not in model_to_save.all_tied_weights_keys}
