"""What launches cost on sm_90 by their machine code: modelled, not measured."""
