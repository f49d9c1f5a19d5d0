"""Operations, memory and time of a network or a step."""
