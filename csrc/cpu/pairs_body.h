// Everything of pairs.h, once per instruction set.
#include "vector_body.h"
#include "widen_body.h"
//
#include "rows_body.h"
#include "tiles_body.h"
//
#include "uel_body.h"
