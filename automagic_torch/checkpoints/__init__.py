"""What `load_state_dict` accepts, and what `state_dict` adds where several processes save."""
