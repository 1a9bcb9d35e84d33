/* How products are shared out to threads, with one matrix and with experts (layout.h). */

#include "layout.h"

#define PASS_BYTES (384 << 10) /* of tiles: they stay in the L2 cache while the weight's groups pass */
#define SHARES_OF_A_THREAD 8   /* so that threads finish together */
#define MOST_OUTPUTS 256       /* of a tile's product: rows times groups times GROUP_ROWS */

/* A pass: some tiles of a route, by which all groups of its matrix are multiplied. A share: some groups of a pass. */
struct shares {
    const struct kernel *kernel;
    struct routes routes;
    int64_t groups, share_groups, shares_of_pass, pass_tiles;
    int64_t route, first_pass; /* of the share before, and the route's first pass among all */
    struct cut cut;            /* of the route */
};

INLINED int64_t ceiling(int64_t count, int64_t of) { return (count + of - 1) / of; }

static int64_t passes_of(const struct shares *shares, int64_t route) {
    return ceiling(cut_of_route(&shares->routes, route, shares->kernel->tile_rows).tiles, shares->pass_tiles);
}

/* Go forward to the route of a pass; gives the pass's number within it. */
static int64_t find_pass(struct shares *shares, int64_t pass) {
    for (int64_t passes; pass >= shares->first_pass + (passes = passes_of(shares, shares->route)); shares->route++)
        shares->first_pass += passes;
    shares->cut = cut_of_route(&shares->routes, shares->route, shares->kernel->tile_rows);
    return pass - shares->first_pass;
}

/* One product of tile and groups; where outputs are not side by side, they are written to their places afterwards. */
static void multiply_tile(const struct shares *shares, void *dst, int64_t tile, int64_t group, int groups) {
    const struct kernel *kernel = shares->kernel;
    const struct routes *routes = &shares->routes;
    const void *weight = source_of(dst, 0), *tiles = source_of(dst, 1);
    const int64_t length = size_of(weight, 0), begin = first_row_of(routes, shares->route) + begin_of_tile(shares->cut, tile);
    const int64_t left = size_of(dst, 0) - group * GROUP_ROWS, width = groups * GROUP_ROWS;
    const int rows = (int)rows_of_tile(shares->cut, tile);
    const size_t group_bytes = length / kernel->items * kernel->bytes * GROUP_ROWS, stride = stride_of(dst, 1);
    const char *from = data_of(weight) + (routes->experts ? routes->experts[shares->route] * stride_of(weight, 2) : 0);
    char *to = data_of(dst) + group * GROUP_ROWS * sizeof(float);
    const char *given = data_of(tiles) + begin * stride_of(tiles, 1);
    if (!routes->pairs && left >= width) {
        kernel->multiply(from + group * group_bytes, given, length, (float *)(to + begin * stride), stride, rows, groups);
        return;
    }
    float outputs[MOST_OUTPUTS];
    kernel->multiply(from + group * group_bytes, given, length, outputs, width * sizeof(float), rows, groups);
    for (int row = 0; row < rows; row++)
        memcpy(to + place_of(routes, begin + row) * stride, outputs + row * width, (left < width ? left : width) * sizeof(float));
}

static void multiply_share(struct shares *shares, void *dst, int64_t share) {
    const int64_t pass = find_pass(shares, share / shares->shares_of_pass), first_tile = pass * shares->pass_tiles;
    const int64_t first_group = share % shares->shares_of_pass * shares->share_groups, after = first_group + shares->share_groups;
    const int64_t end_tile = first_tile + shares->pass_tiles < shares->cut.tiles ? first_tile + shares->pass_tiles : shares->cut.tiles;
    const int64_t end_group = after < shares->groups ? after : shares->groups;
    const bool has_few_rows = shares->cut.tiles == 1 && shares->cut.rows <= 2;
    for (int64_t group = first_group, groups; group < end_group; group += groups) {
        const int64_t most = shares->kernel->groups;
        groups = has_few_rows && group + most <= end_group && (group + most) * GROUP_ROWS <= size_of(dst, 0) ? most : 1;
        for (int64_t tile = first_tile; tile < end_tile; tile++) multiply_tile(shares, dst, tile, group, (int)groups);
    }
}

void multiply_by(const struct kernel *kernel, void *dst, int threads, void *work) {
    const void *tiles = source_of(dst, 1);
    const int64_t groups = ceiling(size_of(dst, 0), GROUP_ROWS), tile_bytes = kernel->tile_rows * stride_of(tiles, 1);
    struct shares shares = {.kernel = kernel, .groups = groups, .share_groups = groups, .shares_of_pass = 1};
    shares.routes = routes_of(source_of(dst, 2), size_of(tiles, 1));
    shares.pass_tiles = tile_bytes < PASS_BYTES ? PASS_BYTES / tile_bytes : 1;
    int64_t passes = 0;
    for (int64_t route = 0; route < shares.routes.used; route++) passes += passes_of(&shares, route);
    if (threads > 1) {
        const int64_t even = groups * passes / (threads * SHARES_OF_A_THREAD) + 1;
        shares.share_groups = even < groups ? even : groups;
        shares.shares_of_pass = ceiling(groups, shares.share_groups);
    }
    struct claims claims = claims_of(work, threads);
    const int64_t count = passes * shares.shares_of_pass;
    for (int64_t share; (share = claim_next(&claims, count)) < count;) multiply_share(&shares, dst, share);
}
